"""What the records of a sweep say: a table for the console, a page, a JSON, and the picture."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ceiling import update_in_block_form
from benchmarks.sweep import one_memory, picture
from benchmarks.sweep.grid import OPERATIONS, ROWS, TINY, Cell
from benchmarks.sweep.journal import Record
from benchmarks.timing import LARGEST_GAP
from fastkm._files import replace_file, write_text
from fastkm.cli.console import markdown_table, show_table

JOURNAL, JSON, PAGE, PICTURE = "cells.jsonl", "sweep.json", "sweep.md", "sweep.png"
RESULTS = (JOURNAL, JSON, PAGE, PICTURE)
HEADERS = ("operation", "K", "C", "T or Q", "B", "kernel ms", "best PyTorch ms", "form", "ratio", "± %", "% of bound",
           "error", "allowed")  # fmt: skip
GRID_HEADERS = ("operation", "B", "T or Q", *map(str, ROWS))


def share_of_bound(record: Record, ceiling: dict[str, float]) -> float:
    """Of the time that matrix products or a copy would take; above 1 where the data stay in a cache."""
    bound = max(record["flops"] / ceiling["product"], record["bytes"] / ceiling["bandwidth"])
    return bound / record["seconds"]


def compared(records: Sequence[Record]) -> list[Record]:
    """Those with a ratio: kernel and form are right."""
    return [record for record in records if "ratio" in record]


def below_one(records: Sequence[Record]) -> list[Record]:
    return sorted((r for r in compared(records) if r["ratio"] < 1), key=lambda record: record["ratio"])


def noise(record: Record) -> float:
    """How much two timings of one thing differ; what is tolerated, where calls are so long that there is one timing."""
    return LARGEST_GAP if record["gap"] is None else record["gap"]


def beyond_noise(record: Record) -> bool:
    """Whether the cell stays below 1 when the kernel is as much faster as two timings of one thing differ."""
    return record["ratio"] * (1 + noise(record)) < 1


def facts(records: Sequence[Record], ceiling: dict[str, float]) -> list[str]:
    """The sweep in sentences."""
    right, told = compared(records), [f"{len(records)} cells, {len(compared(records))} of them with a ratio."]
    for record in records:
        if record["status"] != "right":
            told.append(
                f"{Cell(*record['cell'])}: the kernel is {record['status']}, {record.get('note', record.get('error'))}."
            )
    for name in ("all", *OPERATIONS):
        own = [r for r in right if name in ("all", r["cell"][0])]
        if not own:
            continue
        ratios, shares = [r["ratio"] for r in own], [share_of_bound(r, ceiling) for r in own]
        middle, share = statistics.median(ratios), statistics.median(shares)
        told.append(f"{name}: {len(own)} cells, ratio {min(ratios):.2f} to {max(ratios):.1f}, median {middle:.2f}; "
                    f"share of the bound, median {share:.0%}.")  # fmt: skip
    below = below_one(records)
    surely = sum(map(beyond_noise, below))
    noisy = sum(noise(r) > LARGEST_GAP for r in right)
    told.append(f"{len(below)} cells below 1.0, {surely} of them by more than two timings of one thing differ.")
    told.append(f"{sum(r['gap'] is None for r in right)} cells with calls of seconds have one timing.")
    told.append(f"In {noisy} cells two timings of one thing differ by more than {LARGEST_GAP:.0%}.")
    return told + [f"{tiny_fact(record)}" for record in right if Cell(*record["cell"]) == TINY]


def tiny_fact(record: Record) -> str:
    cell, seconds = Cell(*record["cell"]), record["seconds"]
    flops = cell.batch * update_in_block_form(cell.K, cell.C, cell.count)
    block = record["forms"]["block form"]
    times = f"{block['seconds'] / seconds:.2f} × the block form" if block["status"] == "right" else "no block form"
    return f"{cell}: {times}, {flops / seconds / 1e9:.1f} Gflop/s in the flops of the block form."


def row(record: Record, ceiling: dict[str, float]) -> tuple[str, ...]:
    where = tuple(map(str, record["cell"]))
    if record["status"] != "right":
        return (*where, "FAILED", "", record.get("note", record["status"]), *[""] * (len(HEADERS) - 8))
    own, share = f"{1e3 * record['seconds']:.4g}", f"{share_of_bound(record, ceiling):.0%}"
    errors = f"{record['error']:.0e}", f"{record['allowed']:.0e}"
    if "ratio" not in record:
        return (*where, own, "", record["note"], "", "", share, *errors)
    gap = "once" if record["gap"] is None else f"{100 * record['gap']:.0f}"
    best = f"{1e3 * record['best_seconds']:.4g}", record["best"]
    return (*where, own, *best, f"{record['ratio']:.2f}", gap, share, *errors)


def grid(records: Sequence[Record], value, show) -> list[tuple[str, ...]]:
    """A line for every operation, B, and T or Q: the least ``value`` over C, for each K."""
    lines: dict[tuple, dict[int, float]] = {}
    for record in compared(records):
        cell = Cell(*record["cell"])
        if cell != TINY:
            line = lines.setdefault((cell.operation, cell.batch, cell.count), {})
            line[cell.K] = min(line.get(cell.K, float("inf")), value(record))
    return [(*map(str, where), *(show(line[K]) if K in line else "" for K in ROWS)) for where, line in lines.items()]


def write(data: dict[str, Any], output: Path) -> None:
    records, ceiling = data["cells"], data["ceiling"]
    parts = ["# The sweep", "\n".join(f"* {name}: {value}" for name, value in data["machine"].items())]
    made = [JSON, PAGE]
    if records:
        parts += cells_part(records, ceiling)
    if in_grid := [record for record in records if Cell(*record["cell"]) != TINY]:
        with replace_file(output / PICTURE) as file:
            picture.draw(in_grid, data["machine"], file)
        parts.append(f"![{PICTURE}]({PICTURE})")
        made.append(PICTURE)
    if data["one_memory"]:
        lines = [one_memory.row(record, ceiling) for record in data["one_memory"]]
        show_table(one_memory.TITLE, one_memory.HEADERS, lines, right=one_memory.HEADERS[1:], group=0)
        parts += ["## One memory", one_memory.TITLE, markdown_table(one_memory.HEADERS, lines)]
    write_text(output / JSON, json.dumps(data, indent=1) + "\n")
    write_text(output / PAGE, "\n\n".join(parts) + "\n")
    print(f"Wrote {', '.join(str(output / name) for name in made)} in {data['machine']['minutes']} minutes")


def cells_part(records: Sequence[Record], ceiling: dict[str, float]) -> list[str]:
    """Print the tables, and return them in Markdown."""
    ratios = grid(records, lambda record: record["ratio"], lambda x: f"{x:.2f}" if x < 10 else f"{x:.0f}")
    shares = grid(records, lambda record: share_of_bound(record, ceiling), lambda x: f"{x:.0%}")
    titles = ("Times faster than the best form in PyTorch, by K; the least over C",
              "Share of the bound that matrix products or a copy set, by K; the least over C")  # fmt: skip
    parts, told = [], facts(records, ceiling)
    for title, lines in zip(titles, (ratios, shares), strict=True):
        if lines:
            show_table(title, GRID_HEADERS, lines, right=GRID_HEADERS[1:], group=0)
            parts += [f"## {title}", markdown_table(GRID_HEADERS, lines)]
    below = [row(record, ceiling) for record in below_one(records)]
    if below:
        title = "Cells below 1.0, and how much two timings of one thing differed there"
        show_table(title, HEADERS, below, right=(*HEADERS[1:7], *HEADERS[8:]))
        parts += [f"## {title}", markdown_table(HEADERS, below)]
    print(*told, sep="\n")
    lines = [row(record, ceiling) for record in records]
    told_page = "\n".join(f"* {fact}" for fact in told)
    return ["## In short", told_page, *parts, "## Every cell", markdown_table(HEADERS, lines)]
