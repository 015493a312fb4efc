"""Episodes of held-out images: what is written, the cues it is read with, and the memory before and after."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkm import MemoryState
from fastkm.testing.images import PIXELS, SIDE, Images
from fastkm.testing.presets import Preset
from fastkm.writing.reference import write_gram_space


class Episode(NamedTuple):
    """Inputs of every operation at one preset, all in one dtype."""

    prior: MemoryState  # mean standard normal, cov = I
    values: Tensor  # [B, T, C], codes of held-out images
    weights: Tensor  # [B, T, K], the weights they are written with
    written: MemoryState  # the memory after the episode
    queries: Tensor  # [B, Q, C], codes of clean, noisy and half-hidden cues in turn
    noise_var: Tensor  # [B, T], 1
    ridge: Tensor  # [B], 1
    num_iters: int
    clean: Callable[[Tensor], Tensor]  # codes to codes

    def to(self, dtype: torch.dtype) -> "Episode":
        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) else MemoryState(*map(cast, x)) if isinstance(x, tuple) else x

        return Episode(*map(cast, self))

    def reverse_rows(self) -> "Episode":
        """The same memories with their rows in the opposite order."""
        prior, written = (
            MemoryState(*(reverse_rows(name, x) for name, x in state._asdict().items()))
            for state in (self.prior, self.written)
        )
        return self._replace(prior=prior, written=written, weights=reverse_rows("weights", self.weights))


def reverse_rows(name: str, x: Tensor) -> Tensor:
    """A tensor with axes of K rows, as of a mean [B, K, C], with these reversed; anything else as it is.

    The columns of a root that began as the identity have the order of its rows.
    """
    axes = {"mean": (-2,), "cov": (-2, -1), "root": (-2, -1), "weights": (-1,), "pseudoinverse": (-1,)}
    return x.flip(axes[name]) if name in axes else x


def add_noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return (pixels + 0.3 * torch.randn(pixels.shape, generator=generator, dtype=pixels.dtype)).clamp(0, 1)


def hide_lower_half(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return pixels.unflatten(-1, (SIDE, SIDE)).clone().index_fill_(-2, torch.arange(SIDE // 2, SIDE), 0).flatten(-2)


CUES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "clean": lambda pixels, generator: pixels,
    "noisy": add_noise,
    "half hidden": hide_lower_half,
}


def draw_images(held_out: Tensor, batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Held-out images ``[B, count, 784]``, no image twice in a memory unless there are fewer than ``count``."""
    rounds = -(-count // len(held_out))
    index = [
        torch.cat([torch.randperm(len(held_out), generator=generator) for _ in range(rounds)])[:count]
        for _ in range(batch)
    ]
    return held_out[torch.stack(index)] if batch else held_out.new_empty(0, count, PIXELS)


def build_episode(
    images: Images, preset: Preset, batch: int, num_queries: int, num_iters: int, seed: int = 0
) -> Episode:
    """A float64 episode; the written memory comes from the Gram-space form of the reference."""
    generator, code = torch.Generator().manual_seed(seed), images.components.code(preset.C)
    pixels = draw_images(images.held_out, batch, preset.T, generator)
    picked = torch.randint(preset.T, (batch, num_queries, 1), generator=generator)
    cues = pixels.gather(1, picked.expand(-1, -1, PIXELS))  # [B, Q, 784]
    for kind, corrupt in enumerate(CUES.values()):
        cues[:, kind :: len(CUES)] = corrupt(cues[:, kind :: len(CUES)], generator)

    mean = torch.randn(batch, preset.K, preset.C, generator=generator, dtype=torch.float64)
    prior = MemoryState(mean, torch.eye(preset.K, dtype=torch.float64).repeat(batch, 1, 1))
    values = code.encode(pixels)
    noise_var, ridge = values.new_ones(batch, preset.T), values.new_ones(batch)
    mean, cov, weights, _, _ = write_gram_space(*prior, values, noise_var, ridge)
    written = MemoryState(mean, cov)
    return Episode(prior, values, weights, written, code.encode(cues), noise_var, ridge, num_iters, code.clean)


def remarks(images: Images, presets: list[Preset]) -> list[str]:
    """What a small data set means for these presets, in words."""
    train, held_out = images.num_train, len(images.held_out)
    few_train = [
        f"Note: preset {p.name} has codes of size {p.C}, but {train} training images span at most {train - 1} "
        "directions; the others are arbitrary."
        for p in presets
        if train <= p.C
    ]
    few_held_out = [
        f"Note: preset {p.name} writes {p.T} patterns, but {held_out} images are held out; some are written twice."
        for p in presets
        if held_out < p.T
    ]
    return few_train + few_held_out
