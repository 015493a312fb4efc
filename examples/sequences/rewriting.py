"""Recall where half of the keys get a second value, untrained: only the last one counts. Must a memory forget?

The forgetting task of Zoology (HazyResearch, 2026) with its stacked embeddings. Without decay the filter averages both
values of a key, as least squares does; the delta rule overwrites. Every layer gets the scalars that are best on other
sequences.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from examples.sequences.baselines import gated_delta_rule
from examples.sequences.recall import VOCABULARY, K, share_recalled
from fastkm import MemoryState, filter_posterior

PAIRS = (8, 16, 32, 64)
DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
FORGETTING = (0.8, 0.9, 0.95, 0.98, 0.99)  # 0.5 over 96 steps makes unseen directions 10²⁹ times as uncertain
NOISES = (1e-2, 1e-1, 1.0)
BETAS = (0.2, 0.4, 0.6, 0.8, 1.0)


class Found(NamedTuple):
    rewritten: dict[str, Tensor]  # by layer: share recalled of the keys with two values [seeds, pairs]
    untouched: dict[str, Tensor]  # likewise of the keys with one


def draw(sequences: int, pairs: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys of all pairs, then those of the first half again; their values; the answers for the pairs; all values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (normalize(torch.randn(VOCABULARY, K, generator=generator), dim=-1) for _ in range(2))
    which = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:pairs] for _ in range(sequences)])
    first, second = torch.randint(VOCABULARY, (2, sequences, pairs), generator=generator)
    half = pairs // 2
    answers = torch.cat([second[:, :half], first[:, half:]], 1)
    written = torch.cat([first, second[:, :half]], 1)
    return keys[torch.cat([which, which[:, :half]], 1)], values[written], answers, values


def filtered(k: Tensor, v: Tensor, noise_var: float, **decay: float) -> Tensor:
    """The mean after all writes, in float64: strong forgetting with little noise is more than float32 holds."""
    k, v, B = k.double(), v.double(), len(k)
    prior = MemoryState(k.new_zeros(B, K, K), torch.eye(K, dtype=k.dtype).repeat(B, 1, 1))
    return filter_posterior(prior, k, v, k, noise_var, **decay).state.mean.float()


LAYERS = {
    "exact, no decay": (lambda k, v, noise: filtered(k, v, noise), [NOISES]),
    "exact, retention": (lambda k, v, noise, a: filtered(k, v, noise, retention=a), [NOISES, DECAYS]),
    "exact, forgetting": (lambda k, v, noise, a: filtered(k, v, noise, forgetting=a), [NOISES, FORGETTING]),
    "delta rule": (lambda k, v, beta: gated_delta_rule(k, v, k, 1.0, beta)[1], [BETAS]),
    "gated delta rule": (lambda k, v, a, beta: gated_delta_rule(k, v, k, a, beta)[1], [DECAYS, BETAS]),
}


def shares(state: Tensor, k: Tensor, answers: Tensor, values: Tensor) -> tuple[float, float]:
    """Of the keys with two values, and of the others."""
    pairs = answers.shape[1]
    reads, half = k[:, :pairs] @ state, pairs // 2
    return (
        share_recalled(reads[:, :half], answers[:, :half], values),
        share_recalled(reads[:, half:], answers[:, half:], values),
    )


def best_scalars(run: Callable[..., Tensor], grids: list, k: Tensor, v: Tensor, *answers: Tensor) -> tuple[float, ...]:
    return max(itertools.product(*grids), key=lambda scalars: sum(shares(run(k, v, *scalars), k, *answers)))


def main(sequences: int = 16, seeds: int = 5) -> Found:
    found: tuple[dict, dict] = ({}, {})
    for name, (run, grids) in LAYERS.items():
        columns = []
        for pairs in PAIRS:
            k, v, *other = draw(sequences, pairs, 1_000)
            best = best_scalars(run, grids, k, v, *other)
            made = []
            for seed in range(seeds):
                k, v, *other = draw(sequences, pairs, seed)
                made.append(shares(run(k, v, *best), k, *other))
            columns.append(made)
        both = torch.tensor(columns).permute(2, 1, 0)  # [2, seeds, pairs]
        found[0][name], found[1][name] = both
    return Found(*found)


def rows(found: Found) -> list[tuple[str, ...]]:
    """Percent recalled of rewritten / untouched keys: mean and standard deviation over seeds."""
    return [
        (
            name,
            *(
                f"{100 * two.mean():.1f} ± {100 * two.std():.1f} / {100 * one.mean():.1f} ± {100 * one.std():.1f}"
                for two, one in zip(found.rewritten[name].unbind(1), found.untouched[name].unbind(1), strict=True)
            ),
        )
        for name in found.rewritten
    ]
