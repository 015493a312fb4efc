"""How do I repair a damaged pattern?

One read is linear: it leaves part of the damage. Put what you know about patterns into the loop, here that every entry
is −1 or +1, and read again and again. The energy of the last iteration says whether a pattern was found. On the way it
may rise: this `clean` is not trained to lower it.
"""

import argparse

import torch

import fastkm

K, C, T, FLIPPED, ITERS = 32, 400, 16, 0.3, 8


def main(picture: str | None = None) -> dict[str, float]:
    torch.manual_seed(0)
    patterns = torch.randn(1, T, C).sign()
    prior = fastkm.MemoryState(0.1 * torch.randn(1, K, C), torch.eye(K).unsqueeze(0))
    state = fastkm.write(prior, patterns, noise_var=0.1, ridge=0.1).state

    damaged = torch.where(torch.rand(1, T, C) < FLIPPED, -patterns, patterns)
    once = fastkm.read(state.mean, damaged, ridge=0.1).values
    cleaned = fastkm.attractor_read(
        state, damaged, noise_var=0.1, ridge=0.1, clean=torch.sign, num_iters=ITERS, tol=1e-6
    )

    wrong = {
        name: (x.sign() != patterns).float().mean().item()
        for name, x in (("cue", damaged), ("one read", once), ("attractor read", cleaned.values))
    }
    print(", ".join(f"{name}: {share:.1%} of entries wrong" for name, share in wrong.items()))
    print(f"iterations a query took: {cleaned.num_iters.min()} to {cleaned.num_iters.max()}")
    if picture:
        draw(picture, cleaned.energy[0])
    return wrong | {"energy falls": (cleaned.energy[0, :, -1] < cleaned.energy[0, :, 0]).float().mean().item()}


def draw(picture: str, energy: torch.Tensor) -> None:  # [Q, n]
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot(range(1, energy.shape[1] + 1), energy.T.numpy(), color="tab:blue", alpha=0.35)
    axis.set(xlabel="iteration", ylabel="energy (nats)", title=f"{energy.shape[0]} damaged patterns being read")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", help="where to draw the energy of every iteration")
    main(**vars(parser.parse_args()))
