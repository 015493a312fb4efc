"""The heat map of a sweep: one panel an operation, a square a cell, its colour how much faster than PyTorch."""

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.sweep.grid import BATCHES, CODES, COUNTS, OPERATIONS, ROWS, Cell
from benchmarks.sweep.journal import Record
from fastkm.cli.picture import INK, QUIET
from fastkm.testing.extras import import_extra

TITLES = {
    "update_posterior": ("update_posterior", "T patterns with given weights"),
    "write": ("write", "T patterns, each addressed in the memory that the ones before it left"),
    "read": ("read", "Q queries, one iteration"),
}
COLOURS = ("#8f1d21", "#d9624f", "#f3efe6", "#7db8b0", "#2b7a78", "#123f52")
STOPS = (0.25, 0.7, 1.0, 2.5, 8.0, 40.0)  # times faster, one for each colour
LOSS = "#c0151b"
EMPTY = "#ffffff"
GAP = 0.35  # between groups of cells, in cells


def position(cell: Cell) -> tuple[float, float]:
    """Of a cell's left lower corner: K in groups by C along x, T or Q in groups by B along y."""
    codes = [round(cell.K * ratio) for ratio in CODES.values()]
    column = ROWS.index(cell.K) * (len(CODES) + GAP) + codes.index(cell.C)
    row = BATCHES.index(cell.batch) * (len(COUNTS) + GAP) + COUNTS.index(cell.count)
    return column, row


def shade(ratio: float) -> float:
    """Where a ratio is on the colour scale, 0 to 1; logarithmic between the stops."""
    low, high = STOPS[0], STOPS[-1]
    return math.log(min(max(ratio, low), high) / low) / math.log(high / low)


def number(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.095 else f"{ratio:.2f}".lstrip("0")


def draw(records: Sequence[Record], machine: dict[str, Any], file: str) -> None:
    """Write the picture of cells of the grid as PNG."""
    matplotlib = import_extra("matplotlib")
    matplotlib.use("Agg")
    plt = import_extra("matplotlib.pyplot")
    stops = [(shade(stop), colour) for stop, colour in zip(STOPS, COLOURS, strict=True)]
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("ratio", stops)
    shown = [name for name in OPERATIONS if any(r["cell"][0] == name for r in records)]
    height = 1.9 + 3.35 * len(shown)
    figure = plt.figure(figsize=(15, height), facecolor="white")
    figure.text(0.035, 1 - 0.28 / height, "How many times faster than the best form in PyTorch", color=INK, size=19,
                weight="bold", va="top")  # fmt: skip
    figure.text(0.035, 1 - 0.68 / height, caption(records, machine), color=QUIET, size=9.5, va="top", linespacing=1.5)
    for index, name in enumerate(shown):
        bottom = height - 1.55 - 3.35 * (index + 1) + 0.62
        axes = figure.add_axes((0.1, bottom / height, 0.875, 2.45 / height))
        draw_panel(axes, name, [r for r in records if r["cell"][0] == name], colours)
    draw_scale(figure, height, colours)
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def caption(records: Sequence[Record], machine: dict[str, Any]) -> str:
    return (
        f"float32, {machine['threads']} threads on {machine['processor']}, PyTorch {machine['torch']}. A column is "
        "a memory of K rows, its three squares are codes of K/2, K and 2K numbers; B memories in one call.\nThe best "
        "form is the fastest right one of several in PyTorch, eager or compiled. Red outline: PyTorch is faster. "
        "Cross: a wrong result. Blank: larger than 2 GiB, or codes longer than 2,048."
    )


def draw_panel(axes: Any, name: str, records: Sequence[Record], colours: Any) -> None:
    for record in records:
        draw_cell(axes, record, colours)
    width, height = position(Cell(name, ROWS[-1], 2 * ROWS[-1], COUNTS[-1], BATCHES[-1]))
    axes.set_xlim(-0.1, width + 1.1)
    axes.set_ylim(height + 1.1, -0.1)
    for K in ROWS:
        middle = position(Cell(name, K, K, COUNTS[0], BATCHES[0]))[0] + 0.5
        axes.text(middle, height + 1.35, f"{K:,}", color=INK, size=10, ha="center", va="top")
    axes.text(-0.45, height + 1.35, "K", color=QUIET, size=10, ha="right", va="top", style="italic")
    letter = "Q" if name == "read" else "T"
    for batch in BATCHES:
        for count in COUNTS:
            middle = position(Cell(name, ROWS[0], ROWS[0], count, batch))[1] + 0.5
            axes.text(-0.3, middle, f"{letter} {count}", color=QUIET, size=8.5, ha="right", va="center")
        middle = position(Cell(name, ROWS[0], ROWS[0], COUNTS[1], batch))[1] + 0.5
        axes.text(-2.15, middle, f"B {batch:,}", color=INK, size=10, ha="right", va="center", weight="bold")
    title, words = TITLES[name]
    axes.text(0, -0.45, title, color=INK, size=12.5, weight="bold", va="bottom")
    axes.text(0.155 * (width + 1) * max(1, len(title) / 16), -0.45, words, color=QUIET, size=10, va="bottom")
    axes.set_axis_off()


def draw_cell(axes: Any, record: Record, colours: Any) -> None:
    x, y = position(Cell(*record["cell"]))
    rectangle = import_extra("matplotlib.patches").Rectangle
    ratio = record.get("ratio")
    if ratio is None:
        axes.add_patch(rectangle((x + 0.03, y + 0.03), 0.94, 0.94, facecolor=EMPTY, edgecolor=QUIET, linewidth=0.6))
        axes.text(x + 0.5, y + 0.5, "×", color=LOSS, size=9, ha="center", va="center")
        return
    outline = {"edgecolor": LOSS, "linewidth": 1.3, "zorder": 2} if ratio < 1 else {"edgecolor": "none"}
    axes.add_patch(rectangle((x + 0.03, y + 0.03), 0.94, 0.94, facecolor=colours(shade(ratio)), **outline))
    ink = "white" if shade(ratio) > 0.62 or shade(ratio) < 0.1 else INK
    axes.text(x + 0.5, y + 0.52, number(ratio), color=ink, size=6.8, ha="center", va="center", zorder=3)


def draw_scale(figure: Any, height: float, colours: Any) -> None:
    axes = figure.add_axes((0.675, 1 - 0.5 / height, 0.3, 0.16 / height))
    axes.imshow([[i / 255 for i in range(256)]], aspect="auto", cmap=colours, extent=(0, 1, 0, 1))
    marks = (0.25, 0.5, 1, 2, 4, 8, 16, 40)
    axes.set_xticks([shade(mark) for mark in marks], [f"{mark:g}×" for mark in marks], color=INK, size=8.5)
    axes.set_yticks([])
    axes.tick_params(length=0, pad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)
