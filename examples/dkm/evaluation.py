"""What a trained model does with held-out images: reads of corrupted cues, other memories, capacity."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from examples.dkm.patterns import CORRUPTIONS, binary
from fastkm.models import DynamicKanervaMachine, PatternRead
from fastkm.testing.episodes import draw_images

SHARPNESS = tuple(2.0**i for i in range(-6, 5))  # β of a Hopfield read, tried on training images
LENGTHS = (8, 16, 32, 64, 128, 256)  # patterns stored
HOPFIELD_CUE = "salt and pepper 15 %"


class Reads(NamedTuple):
    """Errors of the same reads [B, Q], the squared ones of the decoder's mean and the wrong pixels of its mode."""

    cue: Tensor
    autoencoder: Tensor  # past the memory
    after: dict[int, Tensor]  # after so many iterations
    wrong_autoencoder: Tensor
    wrong_after: dict[int, Tensor]
    last: PatternRead  # after the most iterations


def draw_episodes(images: Tensor, batch: int, count: int, seed: int) -> Tensor:
    """[B, count, 1, 28, 28]; the same ones every time."""
    return draw_images(images, batch, count, torch.Generator().manual_seed(seed))


def pixel_error(patterns: Tensor, originals: Tensor) -> Tensor:
    """Mean squared error of each pattern [B, Q]."""
    return (patterns - originals).square().flatten(2).mean(-1)


@torch.no_grad()
def autoencode(model: DynamicKanervaMachine, cues: Tensor) -> Tensor:
    return model.decode(model.encode(cues)).mean.view_as(cues)


def read_corrupted(
    model: DynamicKanervaMachine,
    episodes: Tensor,
    corrupt: Callable[[Tensor, torch.Generator], Tensor],
    iterations: tuple[int, ...],
    seed: int = 0,
) -> Reads:
    """Store ``episodes``, corrupt them, and read every pattern back from its corrupted version."""
    state = model.write(episodes).state
    cues = corrupt(episodes, torch.Generator().manual_seed(seed))
    reads = {n: model.attractor_read(cues, n, state=state) for n in iterations}
    alone = autoencode(model, cues)
    return Reads(
        pixel_error(cues, episodes),
        pixel_error(alone, episodes),
        {n: pixel_error(read.patterns, episodes) for n, read in reads.items()},
        pixel_error(binary(alone), episodes),
        {n: pixel_error(binary(read.patterns), episodes) for n, read in reads.items()},
        reads[max(iterations)],
    )


def refusals(read: PatternRead) -> tuple[int, int]:
    """How many steps were not taken because they would have raised the energy, and how many were tried.

    A read without a tolerance ends early for no other reason.
    """
    most = read.energy.shape[-1]
    refused = int((read.num_iters < most).sum())
    return refused, int((read.num_iters - 1).sum()) + refused


def rises(energy: Tensor) -> int:
    """How many steps of the reads ``[B, Q, n]`` raise the energy."""
    return int((energy[..., 1:] > energy[..., :-1]).sum())


# ---- other memories, on the same codes: they keep every pattern --------------------------------------------------


def hopfield_read(stored: Tensor, queries: Tensor, sharpness: float) -> Tensor:
    """``softmax(β z Zᵀ) Z``, one step of a modern Hopfield network [B, Q, C]."""
    return scaled_dot_product_attention(queries, stored, stored, scale=sharpness)


def nearest(stored: Tensor, queries: Tensor) -> Tensor:
    """The stored code closest to each query [B, Q, C]."""
    index = torch.cdist(queries, stored).argmin(-1, keepdim=True)
    return stored.gather(1, index.expand(-1, -1, stored.shape[-1]))


@torch.no_grad()
def best_sharpness(model: DynamicKanervaMachine, images: Tensor, count: int) -> float:
    """β with the least error on training images, so that the comparison is with a Hopfield read at its best."""
    episodes = draw_episodes(images, 4, count, seed=1)
    cues = CORRUPTIONS[HOPFIELD_CUE](episodes, torch.Generator().manual_seed(1))
    stored, queries = model.encode(episodes), model.encode(cues)

    def error(sharpness: float) -> float:
        decoded = model.decode(hopfield_read(stored, queries, sharpness)).mean.view_as(episodes)
        return pixel_error(decoded, episodes).mean().item()

    return min(SHARPNESS, key=error)


@torch.no_grad()
def capacity(
    model: DynamicKanervaMachine, train: Tensor, test: Tensor, num_iters: int, *, longest: int = 256, drawn: int = 512
) -> list[dict[str, float]]:
    """Error and bound against the number of stored patterns, with the same cues for every memory.

    Of every number up to ``longest`` about ``drawn`` patterns are stored, over all memories.
    """
    rows = []
    for length in LENGTHS:
        if length > min(len(test), longest):
            break
        episodes = draw_episodes(test, max(2, drawn // length), length, seed=2)
        cues = CORRUPTIONS[HOPFIELD_CUE](episodes, torch.Generator().manual_seed(2))
        stored, queries, state = model.encode(episodes), model.encode(cues), model.write(episodes).state
        sharpness = best_sharpness(model, train, length)
        reads = {
            "one read": model.reconstruct(cues, state=state),
            f"{num_iters} iterations": model.attractor_read(cues, num_iters, state=state).patterns,
            "Hopfield": model.decode(hopfield_read(stored, queries, sharpness)).mean.view_as(cues),
            "nearest neighbour": model.decode(nearest(stored, queries)).mean.view_as(cues),
            "auto-encoder": autoencode(model, cues),
        }
        torch.manual_seed(2)
        rows.append(
            {
                "stored": length,
                **{name: pixel_error(read, episodes).mean().item() for name, read in reads.items()},
                "bound": model.conditional_bound(episodes).mean().item(),
                "sharpness": sharpness,
            }
        )
    return rows
