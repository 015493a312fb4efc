"""Continuous multi-query recall, untrained: how many pairs does a memory of K rows give back?

The stacked task of Zoology (HazyResearch, 2026): keys and values are fixed vectors of length 1 for a vocabulary of
8,192; a sequence writes pairs, then every key is asked for, and the answer is the nearest of all values. Projections
are the identity: this is the memory alone. Not of Zoology is the harder half, where all keys share one direction.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from examples.sequences.baselines import conjugate_gradients, exact, gated_delta_rule, linear_attention

K, VOCABULARY, NOISE_VAR = 64, 8_192, 1e-2
PAIRS = (16, 32, 64, 96, 128, 256)
BETAS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
SHARED = 2.0  # length of the shared direction beside a random part of length 1: keys have an inner product of 0.8


class Found(NamedTuple):
    recalled: dict[str, Tensor]  # by layer: share of the answers that are right [seeds, pairs]
    betas: list[float]  # the best of the delta rule, for each number of pairs


def draw(sequences: int, pairs: int, seed: int, shared: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values of pairs, which values these are, and all values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (normalize(torch.randn(VOCABULARY, K, generator=generator), dim=-1) for _ in range(2))
    keys = normalize(keys + shared * torch.eye(K)[0], dim=-1)
    which = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:pairs] for _ in range(sequences)])
    answers = torch.randint(VOCABULARY, (sequences, pairs), generator=generator)
    return keys[which], values[answers], answers, values


def share_recalled(reads: Tensor, answers: Tensor, values: Tensor) -> float:
    return ((reads @ values.mT).argmax(-1) == answers).float().mean().item()


def mesa(k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    return conjugate_gradients(k.mT @ k, k, NOISE_VAR, 30, dtype) @ (k.mT @ v)


def delta(k: Tensor, v: Tensor, beta: float) -> Tensor:
    return k @ gated_delta_rule(k, v, k, 1.0, beta)[1]


LAYERS = {
    "exact": lambda k, v: k @ exact(k, v, k, NOISE_VAR)[2].mean,
    "Mesa, 30 CG steps, float32": lambda k, v: mesa(k, v, torch.float32),
    "Mesa, 30 CG steps, float16": lambda k, v: mesa(k, v, torch.float16),
    "sum": lambda k, v: k @ linear_attention(k, v, k, 1.0)[1],
}


def main(sequences: int = 16, seeds: int = 5, shared: float = 0.0) -> Found:
    recalled: dict[str, list[list[float]]] = {name: [] for name in (*LAYERS, "delta rule, best β")}
    betas = []
    for pairs in PAIRS:
        k, v, *other = draw(sequences, pairs, 1_000, shared)
        betas.append(max(BETAS, key=lambda beta, k=k, v=v, other=other: share_recalled(delta(k, v, beta), *other)))
    for seed in range(seeds):
        shares: dict[str, list[float]] = {name: [] for name in recalled}
        for pairs, beta in zip(PAIRS, betas, strict=True):
            k, v, *other = draw(sequences, pairs, seed, shared)
            for name, layer in LAYERS.items():
                shares[name].append(share_recalled(layer(k, v), *other))
            shares["delta rule, best β"].append(share_recalled(delta(k, v, beta), *other))
        for name, found in shares.items():
            recalled[name].append(found)
    return Found({name: torch.tensor(found) for name, found in recalled.items()}, betas)


def rows(found: Found) -> list[tuple[str, ...]]:
    """Percent recalled: mean and standard deviation over seeds."""
    return [
        (name, *(f"{100 * x.mean():.1f} ± {100 * x.std():.1f}" for x in shares.unbind(1)))
        for name, shares in found.recalled.items()
    ]


def draw_picture(plain: Found, hard: Found, path: str) -> None:
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for axes, found, title in zip(both, (plain, hard), ("random keys", "keys that share a direction"), strict=True):
        for name, shares in found.recalled.items():
            axes.plot([pairs / K for pairs in PAIRS], shares.mean(0), "o-", label=name)
        axes.set(xlabel="pairs / K", title=title, ylim=(0, 1.03))
    both[0].set_ylabel("share recalled")
    both[1].legend()
    figure.savefig(path, dpi=110)
