"""Binary patterns to train the generative model on, with a part held out that training never sees."""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastkm.testing.images import SIDE, read_images, refuse_equal

HELD_OUT = 5  # one image, or one class of images, in this many
INK = 0.5  # a pixel brighter than this is on
SHIFT = 2  # pixels that training images are moved by at most, so that few thousand of them go further


class Patterns(NamedTuple):
    source: str
    split: str  # what was held out, in words
    train: Tensor  # [N, 1, 28, 28] float32, grey
    test: Tensor  # [M, 1, 28, 28] float32, binary


def load_patterns(data: str) -> Patterns:
    """``mnist``, or the PNGs of a folder or zip, in which a folder with several images is a class.

    Of classes a fifth is held out whole, so that the test part holds classes nobody has seen; where there are none,
    and of the digits, it is a fifth of the images. The same split every time.
    """
    names, pixels, source = read_images(data)
    if names is None:
        names = [str(i) for i in range(len(pixels))]  # ten digits are too few to hold some of them out
    classes = [str(PurePosixPath(name).parent) for name in names]
    if len(set(classes)) < 2 * HELD_OUT:
        classes = names
    distinct = sorted(set(classes))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = {distinct[i] for i in order[: len(distinct) // HELD_OUT]}
    test = torch.tensor([name in held_out for name in classes])
    images = pixels.float().unflatten(1, (1, SIDE, SIDE))
    refuse_equal(binary(images[~test]), f"the training images, with a pixel on where it is above {INK},")
    what = "images" if len(distinct) == len(images) else "classes"
    split = f"{len(held_out):,} of {len(distinct):,} {what} held out: {len(images) - int(test.sum()):,} images train, "
    return Patterns(source, f"{split}{int(test.sum()):,} test", images[~test], binary(images[test]))


def binary(images: Tensor) -> Tensor:
    return (images > INK).to(images.dtype)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, 1, 28, 28], each moved by whole pixels at random: strokes stay as they are."""
    padded = pad(images, (SHIFT, SHIFT, SHIFT, SHIFT))
    top, left = torch.randint(2 * SHIFT + 1, (2, len(images), 1), generator=generator)
    rows, columns = top + torch.arange(SIDE), left + torch.arange(SIDE)  # [N, 28]
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None]].unsqueeze(1)


# ---- corruptions of binary patterns [..., 1, 28, 28] ---------------------------------------------------------------


def salt_and_pepper(patterns: Tensor, fraction: float | Tensor, generator: torch.Generator) -> Tensor:
    """This fraction of the pixels becomes on or off with even odds."""
    hit, value = torch.rand(2, *patterns.shape, generator=generator)
    return torch.where(hit < fraction, (value < 0.5).to(patterns.dtype), patterns)


def occlude(patterns: Tensor, generator: torch.Generator) -> Tensor:
    """A block of half the height and half the width, somewhere in the image, is blanked: a quarter of the pixels."""
    height, width = patterns.shape[-2:]
    shape = patterns.shape[:-2]
    top = torch.randint(height // 2 + 1, shape, generator=generator)[..., None, None]
    left = torch.randint(width // 2 + 1, shape, generator=generator)[..., None, None]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    hidden = (rows >= top) & (rows < top + height // 2) & (columns >= left) & (columns < left + width // 2)
    return patterns.masked_fill(hidden, 0)


def corrupt(patterns: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the patterns [B, T, 1, 28, 28] with up to 30 % salt and pepper, half of them occluded."""
    batch = patterns.shape[:2]
    level = 0.3 * torch.rand(*batch, 1, 1, 1, generator=generator)
    noisy, hidden = salt_and_pepper(patterns, level, generator), occlude(patterns, generator)
    return torch.where(torch.rand(*batch, 1, 1, 1, generator=generator) < 0.5, noisy, hidden)


def gaussian(patterns: Tensor, stddev: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise, clipped to [0, 1]."""
    return (patterns + stddev * torch.randn(patterns.shape, generator=generator)).clamp(0, 1)


CORRUPTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "nothing": lambda x, generator: x,
    "salt and pepper 5 %": lambda x, generator: salt_and_pepper(x, 0.05, generator),
    "salt and pepper 15 %": lambda x, generator: salt_and_pepper(x, 0.15, generator),
    "salt and pepper 30 %": lambda x, generator: salt_and_pepper(x, 0.30, generator),
    "a quarter occluded": occlude,
    "Gaussian 0.3": lambda x, generator: gaussian(x, 0.3, generator),
}
