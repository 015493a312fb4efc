"""In-context linear regression, untrained: is every forecast the best one, and are its intervals honest?

The task of Garg et al., 2022, with noise: y = wᵀx + ε, d = 20, x and w standard normal, and each sequence has a w of
its own. Keys and queries are x, the values y: nothing is learned. Other layers get the scalars that are best on other
sequences.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import ndtri

from examples.sequences.baselines import exact, gated_delta_rule, linear_attention

D, STEPS, NOISE_VAR, SHOWN = 20, 41, 0.25, (1, 5, 10, 20, 30, 41)
LEVELS = (0.5, 0.9, 0.95)


class Found(NamedTuple):
    errors: dict[str, Tensor]  # by layer: squared error / d at every step [seeds, T]
    gap: float  # of the exact layer to the Bayes-optimal forecast, the largest
    covered: Tensor  # how often y is within its interval [seeds, levels, T]


def draw(sequences: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, STEPS, D, generator=generator)
    w = torch.randn(sequences, D, 1, generator=generator)
    return x, x @ w + math.sqrt(NOISE_VAR) * torch.randn(sequences, STEPS, 1, generator=generator)


def bayes_optimal(x: Tensor, y: Tensor) -> Tensor:
    """wᵀx_t with the posterior mean of w given the steps before t, by one solve in float64 for every t."""
    x, y = x.double(), y.double()
    forecasts = [torch.zeros_like(y[:, :1])]
    for t in range(1, STEPS):
        past = x[:, :t]
        gram = past.mT @ past + NOISE_VAR * torch.eye(D, dtype=torch.float64)
        w = torch.cholesky_solve(past.mT @ y[:, :t], torch.linalg.cholesky(gram))
        forecasts.append(x[:, t : t + 1] @ w)
    return torch.cat(forecasts, 1)


LAYERS = {
    "delta rule": (lambda x, y, beta: gated_delta_rule(x, y, x, 1.0, beta)[0], [[b / 400 for b in range(1, 40, 2)]]),
    "gated delta rule": (
        lambda x, y, alpha, beta: gated_delta_rule(x, y, x, alpha, beta)[0],
        [[0.9, 0.95, 0.98, 0.99, 0.995, 1.0], [b / 400 for b in range(1, 40, 2)]],
    ),
    "linear attention": (lambda x, y, beta: linear_attention(x, y, x, beta)[0], [[b / 200 for b in range(1, 16)]]),
}


def best_scalars(layer: str, sequences: int) -> tuple[float, ...]:
    """Those with the least error over all steps, on sequences of another seed."""
    x, y = draw(sequences, 1_000)
    run, grids = LAYERS[layer]
    return min(itertools.product(*grids), key=lambda scalars: (run(x, y, *scalars) - y).square().mean().item())


def main(sequences: int = 1_000, seeds: int = 5) -> Found:
    scalars = {layer: best_scalars(layer, sequences) for layer in LAYERS}
    errors: dict[str, list[Tensor]] = {name: [] for name in ("exact", "Bayes optimal", *LAYERS)}
    gap, covered = 0.0, []
    for seed in range(seeds):
        x, y = draw(sequences, seed)
        forecast, variance, _ = exact(x, y, x, NOISE_VAR)
        optimal = bayes_optimal(x, y)
        gap = max(gap, (forecast - optimal).abs().max().item())
        made = {"exact": forecast, "Bayes optimal": optimal.float()}
        made |= {layer: LAYERS[layer][0](x, y, *scalars[layer]) for layer in LAYERS}
        for name, found in made.items():
            errors[name].append((found - y).square().mean((0, 2)) / D)
        score = (y - forecast).squeeze(-1).abs() / (variance + NOISE_VAR).sqrt()
        reach = ndtri(torch.tensor([(1 + level) / 2 for level in LEVELS]))
        covered.append((score < reach[:, None, None]).float().mean(1))
    return Found({name: torch.stack(found) for name, found in errors.items()}, gap, torch.stack(covered))


def rows(found: Found) -> list[tuple[str, ...]]:
    """Squared error / d at the steps that are shown: mean and standard deviation over seeds."""
    return [
        (name, *(f"{e[:, t - 1].mean():.4f} ± {e[:, t - 1].std():.4f}" for t in SHOWN))
        for name, e in found.errors.items()
    ]


def draw_picture(found: Found, path: str) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, errors in found.errors.items():
        left.plot(range(STEPS), errors.mean(0), "--" if name == "Bayes optimal" else "-", label=name)
    left.set(xlabel="examples seen", ylabel="squared error / d", ylim=(0, None))
    left.legend()
    for i, level in enumerate(LEVELS):
        right.plot(range(STEPS), found.covered[:, i].mean(0), label=f"{level:.0%} interval")
        right.axhline(level, color="grey", linewidth=0.7)
    right.set(xlabel="examples seen", ylabel="how often y is inside", ylim=(0.4, 1))
    right.legend()
    figure.savefig(path, dpi=110)
