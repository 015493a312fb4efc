"""Is the kernel that runs on my machine exact?

Compute in float64 with the reference, which is plain PyTorch, and call that the truth. Then measure how far each
backend lies from it in float32. `python -m fastkm check` does this for every operation, shape and dtype.
"""

import argparse

import torch

import fastkm

B, K, C, T, RIDGE, NOISE_VAR = 4, 32, 100, 64, 1.0, 1.0


def main(picture: str | None = None) -> dict[str, float]:
    torch.manual_seed(0)
    mean, values = torch.randn(B, K, C, dtype=torch.float64), torch.randn(B, T, C, dtype=torch.float64)
    prior = fastkm.MemoryState(mean, torch.eye(K, dtype=torch.float64).expand(B, K, K))
    truth = fastkm.write(prior, values, NOISE_VAR, RIDGE, backend="reference").state.mean

    single = fastkm.MemoryState(*(x.float() for x in prior))
    errors = {}
    for backend in ("reference", "native", "triton"):
        try:
            got = fastkm.write(single, values.float(), NOISE_VAR, RIDGE, backend=backend).state.mean
        except fastkm.BackendUnavailableError as reason:
            print(reason)
            continue
        errors[backend] = ((got.double() - truth).abs().max() / truth.abs().max()).item()
        print(f"{backend:<10} largest error {errors[backend]:.1e} of the largest entry")
    fastkm.explain_backend("write", *single, values.float())
    if picture:
        draw(picture, errors)
    return errors


def draw(picture: str, errors: dict[str, float]) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 2.2), layout="constrained")
    axis.barh(list(errors), list(errors.values()))
    axis.axvline(torch.finfo(torch.float32).eps, color="gray", linestyle="--", label="spacing of float32 at 1")
    axis.set_xlabel("largest error against float64, of the largest entry")
    axis.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", help="where to draw the errors")
    main(**vars(parser.parse_args()))
