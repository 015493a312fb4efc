"""How sure is the memory?

A memory is a distribution over matrices. Draw samples of it, read off the variance of what a read returns, and measure
in nats how far the memory has moved from its prior.
"""

import argparse

import torch
from torch.distributions import kl_divergence

import fastkm

K, C, T, SAMPLES, NOISE_VAR = 12, 30, 24, 4_000, 0.25


def main(picture: str | None = None) -> dict[str, float]:
    torch.manual_seed(0)
    prior = fastkm.MemoryState(torch.randn(1, K, C), torch.eye(K).unsqueeze(0))
    weights, values = torch.randn(1, T, K) / K**0.5, torch.randn(1, T, C)

    spread, cost = [], []
    for t in range(T + 1):  # what the memory believes after t patterns
        state = fastkm.update_posterior(prior, weights[:, :t], values[:, :t], NOISE_VAR).state
        spread.append((weights @ state.cov * weights).sum(-1).mean().item())  # wᵀ U w, averaged over the patterns
        cost.append(fastkm.kl_memory(state, prior).item())

    law = fastkm.MatrixNormal(*state)
    reads = weights[0, :1] @ law.sample((SAMPLES,))[:, 0]  # one read of every sampled memory [SAMPLES, 1, C]
    sampled = reads.var(0).mean().item()
    computed = (weights[0, :1] @ state.cov[0] @ weights[0, :1].T).item()
    print(f"variance of a read: {computed:.4f} computed, {sampled:.4f} from {SAMPLES:,} samples")
    again = kl_divergence(law, fastkm.MatrixNormal(*prior)).item()
    print(f"divergence from the prior: {cost[-1]:.1f} nats; by torch.distributions {again:.1f}")
    if picture:
        draw(picture, spread, cost)
    return {
        "computed": computed,
        "sampled": sampled,
        "before": spread[0],
        "after": spread[-1],
        "nats": cost[-1],
        "again": again,
    }


def draw(picture: str, spread: list[float], cost: list[float]) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(spread)
    left.set(xlabel="patterns written", ylabel="variance of a read", ylim=(0, None))
    right.plot(cost)
    right.set(xlabel="patterns written", ylabel="divergence from the prior (nats)")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", help="where to draw variance and divergence")
    main(**vars(parser.parse_args()))
