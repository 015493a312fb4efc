"""The picture of a benchmark: what was written, the cues, and what was read back."""

import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

import fastkm
from fastkm import MemoryState
from fastkm._files import replace_file
from fastkm.testing.episodes import CUES, draw_images
from fastkm.testing.extras import import_extra
from fastkm.testing.images import SIDE, Images
from fastkm.testing.presets import Preset

SHOWN, GAP = 10, 2  # images in a row, pixels between them
INK, QUIET = "#1d2433", "#6b7385"


class Strip(NamedTuple):
    """A row of the picture."""

    label: str
    pixels: Tensor  # [1, T, 784]
    error: float  # root mean square against the written images


def draw_picture(images: Images, preset: Preset, path: Path) -> str:
    """Write one episode, read it back once from every kind of cue, draw that to ``path``; the errors in words."""
    generator, code = torch.Generator().manual_seed(1), images.components.code(preset.C)
    pixels = draw_images(images.held_out, 1, preset.T, generator).float()  # [1, T, 784]
    mean = torch.randn(1, preset.K, preset.C, generator=generator)
    memory = fastkm.write(MemoryState(mean, torch.eye(preset.K)[None]), code.encode(pixels), 1.0, 1.0).state

    def strip(label: str, shown: Tensor) -> Strip:
        shown = shown.clamp(0, 1)
        return Strip(label, shown, (shown - pixels).square().mean().sqrt().item())

    groups = [[strip("written", pixels), strip("code, decoded", code.decode(code.encode(pixels)))]]
    for name, corrupt in CUES.items():
        cue = corrupt(pixels, generator)
        values = fastkm.read(memory.mean, code.encode(cue), 1.0).values
        groups.append([strip(f"{name} cue", cue), strip("read back", code.decode(values))])
    words = (
        f"{preset.T} held-out images of {images.source}, as {preset.C} principal components, written one after the "
        f"other into a memory of {preset.K} rows and read back once; the first {SHOWN} are shown. A read is a linear "
        "map of the cue: it keeps what the memory's rows span and drops the rest. That is not clean-up: a corrupted "
        "cue comes back as a blend of stored patterns. The second row, the decoded code itself, is the most that a "
        "read can return."
    )
    _draw(groups, words, path)
    return f"Root mean square pixel error at preset {preset.name}: " + "; ".join(
        f"{cue.label} {cue.error:.3f}, {read.label} {read.error:.3f}" for cue, read in groups
    )


def _draw(groups: list[list[Strip]], words: str, path: Path) -> None:
    import_extra("matplotlib").use("Agg")
    plt = import_extra("matplotlib.pyplot")
    figure = plt.figure(figsize=(9, 7.4), facecolor="white")
    figure.text(
        0.03, 0.965, "Images written into the memory and read back", color=INK, size=15, weight="bold", va="top"
    )
    figure.text(0.03, 0.925, textwrap.fill(words, 122), color=QUIET, size=8.5, va="top", linespacing=1.45)
    figure.text(0.985, 0.822, "RMS error", color=QUIET, size=8.5, ha="right", va="center")
    height, top = 0.0906, 0.81
    for group in groups:
        for strip in group:
            top -= height
            axes = figure.add_axes((0.155, top, 0.745, height))
            axes.imshow(_row(strip.pixels), cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set_axis_off()
            middle, bold = top + height / 2, "bold" if strip.label == "read back" else "normal"
            figure.text(0.145, middle, strip.label, color=INK, size=10, ha="right", va="center", weight=bold)
            error = "–" if strip.error == 0 else f"{strip.error:.3f}"
            figure.text(0.985, middle, error, color=INK, size=10, ha="right", va="center", weight=bold)
        top -= 0.014
    with replace_file(path) as file:
        figure.savefig(file, dpi=170)
    plt.close(figure)


def _row(pixels: Tensor) -> np.ndarray:
    """The first images side by side, with white between them."""
    images = pad(pixels[0, :SHOWN].unflatten(-1, (SIDE, SIDE)), (GAP, GAP, GAP, GAP), value=1.0)
    return images.permute(1, 0, 2).flatten(1).numpy()
