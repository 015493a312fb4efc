"""The pictures of a trained model: reads of corrupted images, samples, capacity."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastkm._files import replace_file
from fastkm.models import DynamicKanervaMachine
from fastkm.testing.extras import import_extra

INK, QUIET = "#1d2433", "#6b7385"  # colours of what is read first, and of the rest
ITERATIONS = (1, 2, 4, 8)
IN_A_ROW = 10
TITLE = {"color": INK, "fontsize": 11, "fontweight": "bold", "loc": "left"}


def plot() -> ModuleType:
    import_extra("matplotlib").use("Agg")
    return import_extra("matplotlib.pyplot")


def save(figure: Any, path: Path) -> None:
    with replace_file(path) as file:
        figure.savefig(file, dpi=150)
    plot().close(figure)


def row_of(images: Tensor) -> Tensor:
    """The first images [N, 1, 28, 28] side by side, with white between them."""
    return pad(images[:IN_A_ROW, 0], (1, 1, 1, 1), value=1.0).permute(1, 0, 2).flatten(1)


def sheet_of(images: Tensor) -> Tensor:
    """All images in rows, the last one filled up with white."""
    missing = -len(images) % IN_A_ROW
    filled = torch.cat([images, images.new_ones(missing, *images.shape[1:])])
    return torch.cat([row_of(row) for row in filled.split(IN_A_ROW)])


def draw_reads(
    model: DynamicKanervaMachine,
    episode: Tensor,  # [1, T, 1, 28, 28]
    corruptions: dict[str, Callable[[Tensor, torch.Generator], Tensor]],
    path: Path,
) -> None:
    """Originals, cues and what iterating makes of them, for every corruption, with the energies below."""
    plt, state = plot(), model.write(episode).state
    figure, axes = plt.subplots(
        2, len(corruptions), figsize=(4.6 * len(corruptions), 6.2), height_ratios=(3, 2), layout="constrained"
    )
    for column, (name, corrupt) in enumerate(corruptions.items()):
        cues = corrupt(episode, torch.Generator().manual_seed(0))
        reads = {n: model.attractor_read(cues, n, state=state) for n in ITERATIONS}
        strips = {"stored": episode, "cue": cues, **{f"read {n}": read.patterns for n, read in reads.items()}}
        image = torch.cat([row_of(x[0]) for x in strips.values()])
        upper, lower = axes[0, column], axes[1, column]
        upper.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        errors = [(x - episode).square().mean().item() for x in strips.values()]
        middles = [(i + 0.5) * len(image) / len(strips) for i in range(len(strips))]
        upper.set_yticks(middles, [f"{label}\n{error:.3f}" for label, error in zip(strips, errors, strict=True)])
        upper.set_xticks([])
        upper.tick_params(length=0, labelsize=8, colors=INK)
        upper.set_title(name, **TITLE)
        energy = reads[max(ITERATIONS)].energy[0]  # [T, n]
        steps = range(1, energy.shape[1] + 1)
        lower.plot(steps, energy.mT.numpy(), color=QUIET, linewidth=0.5, alpha=0.5)
        lower.plot(steps, energy.mean(0).numpy(), color="#c2410c", linewidth=2, label="mean")
        lower.set_yscale("log")
        lower.set_xlabel("iteration", color=INK)
        lower.set_ylabel("energy (nats)" if column == 0 else "", color=INK)
        lower.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{episode.shape[1]} held-out images in one memory of {model.memory.memory_size} rows; "
        "below each name its mean squared pixel error",
        color=QUIET, fontsize=9,
    )  # fmt: skip
    save(figure, path)


def draw_samples(model: DynamicKanervaMachine, episode: Tensor, num_iters: int, path: Path) -> None:
    """What the memory dreams up, before and after clean-up, beside what is stored in it."""
    plt, state = plot(), model.write(episode).state
    count, generated = 3 * IN_A_ROW, {}
    for n in (1, num_iters):
        torch.manual_seed(0)  # the same weights, read again
        generated[n] = model.generate(count, n, state=state)[0]
    panels = {
        "stored": episode[0, :count],
        "decoded from random weights": generated[1],
        f"the same after {num_iters} iterations": generated[num_iters],
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 2.4), layout="constrained")
    for axis, (name, images) in zip(axes, panels.items(), strict=True):
        axis.imshow(sheet_of(images).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(name, **TITLE)
    save(figure, path)


def draw_capacity(rows: list[dict[str, float]], path: Path) -> None:
    """Error and bound against the number of stored patterns, beside memories that keep every pattern."""
    plt = plot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    stored = [row["stored"] for row in rows]
    for name in rows[0]:
        if name not in ("stored", "bound", "sharpness"):
            left.plot(stored, [row[name] for row in rows], marker="o", label=name)
    left.set_ylabel("mean squared pixel error", color=INK)
    left.legend(frameon=False, fontsize=8)
    left.set_title("Reading corrupted cues", **TITLE)
    right.plot(stored, [row["bound"] for row in rows], marker="o", color="#c2410c")
    right.set_ylabel("negative conditional bound (nats a pattern)", color=INK)
    right.set_title("Explaining what was stored", **TITLE)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(stored, [str(int(n)) for n in stored])
        axis.set_xlabel("stored patterns", color=INK)
    save(figure, path)
