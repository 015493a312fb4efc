"""Every shape beside the best form in PyTorch: `make sweep`.

update_posterior, write and read of float32 memories, for every cell of a grid over K, C, T or Q, and B. The kernel's
result is checked before it is timed, and so is every form's. A cell that was measured is kept, so that a run that was
stopped goes on; a new build starts anew. Writes results/sweep/sweep.json, sweep.md, sweep.png and one-memory.md.
"""

import argparse
import math
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.ceiling import Ceiling
from benchmarks.sweep import one_memory, report
from benchmarks.sweep.grid import BATCHES, COUNTS, OPERATIONS, ROWS, all_cells, select
from benchmarks.sweep.journal import Journal, digest_of_code, machine_of
from benchmarks.sweep.measure import Sweep, few_compilations
from benchmarks.timing import keep_freed_memory, pin
from fastkm._runtime import schema
from fastkm.cli.console import (
    add_threads,
    check_writable,
    duration,
    exit_status,
    positive_number,
    progress,
    whole_number,
)
from fastkm.cli.machine import machine
from fastkm.testing.extras import UserError, import_extra

PARTS = ("cells", "one-memory")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=[], metavar="NAME",
                        help=f"of {', '.join(OPERATIONS)} (default: all)")  # fmt: skip
    for letter, word, sizes in (
        ("K", "rows", ROWS),
        ("C", "codes", ()),
        ("T", "counts", COUNTS),
        ("B", "batches", BATCHES),
    ):
        known = f"; the grid has {', '.join(map(str, sizes))}" if sizes else ""
        parser.add_argument(f"--{letter}", dest=word, nargs="+", type=whole_number(1), default=[], metavar=letter,
                            help=f"only cells with this {letter}{' or Q' if letter == 'T' else ''}{known}")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)} (default: both)")  # fmt: skip
    parser.add_argument("--seconds", type=duration, default=0.2, help="of timing a cell (default: %(default)s)")
    parser.add_argument("--minutes", type=positive_number, default=math.inf,
                        help="stop before a cell after so long; the next run goes on (default: never)")  # fmt: skip
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile")
    parser.add_argument("--compile-limit", type=whole_number(1), default=120, help="seconds a compilation may take")
    parser.add_argument("--fresh", action="store_true", help="measure again what is measured already")
    add_threads(parser)
    parser.add_argument("--output", type=Path, default=Path("results/sweep"), metavar="FOLDER")
    return parser


def measure_cells(options: argparse.Namespace, journal: Journal, ceiling: Ceiling) -> list[dict[str, Any]]:
    """The records of all chosen cells, those that an earlier run measured among them."""
    cells = select(all_cells(), options.operations, options.rows, options.codes, options.counts, options.batches)
    if not cells:
        raise UserError("the grid has no such cell")
    known = {} if options.fresh else journal.read()
    sweep = Sweep(options.seconds, options.compile, options.compile_limit)
    missing = [cell for cell in cells if cell not in known]
    end = time.monotonic() + 60 * options.minutes
    with few_compilations(), progress("sweep", len(cells), len(cells) - len(missing), seconds=10) as start:
        for cell in cells:
            if cell in known:
                sweep.remember(known[cell])
                continue
            if time.monotonic() > end:
                break
            start(str(cell))
            known[cell] = sweep.measure(cell)
            journal.note(known[cell])
            if time.monotonic() - ceiling.last > 120:
                ceiling.measure(1)
    if absent := [cell for cell in cells if cell not in known]:
        print(f"{len(absent)} cells are left, from {absent[0]} on: the same command goes on with them.")
    return [known[cell] for cell in cells if cell in known]


def run(options: argparse.Namespace) -> int:
    begin = time.perf_counter()
    check_writable(*(options.output / name for name in report.RESULTS))
    import_extra("matplotlib")  # the picture is drawn at the end
    if schema.unavailable is not None:
        raise UserError(f"there is nothing to compare: {schema.unavailable}")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")  # torch about itself
    pinned, ceiling = pin(options.threads), Ceiling()
    about: dict[str, Any] = {**machine(), "pinned": pinned, "freed memory": keep_freed_memory()}
    about |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "code": digest_of_code()}
    print(*(f"{name:<18} {value}" for name, value in about.items()), sep="\n", flush=True)
    ceiling.measure()
    data: dict[str, Any] = {"machine": about, "cells": [], "one_memory": []}
    if "cells" in options.parts:
        journal = Journal(options.output / report.JOURNAL, about["code"], machine_of(options.threads))
        data["cells"] = measure_cells(options, journal, ceiling)
    if "one-memory" in options.parts:
        data["one_memory"] = one_memory.measure(options.threads, options.seconds, options.operations, options.rows)
    ceiling.measure()
    print(f"{'ceilings':<18} {ceiling.describe()}")
    data["ceiling"] = {"product": ceiling.product["float32"], "bandwidth": ceiling.bandwidth}
    about["minutes"] = round((time.perf_counter() - begin) / 60, 1)
    report.write(data, options.output)
    return 1 if any(r["status"] != "right" for r in data["cells"]) else 0


def main(arguments: list[str] | None = None) -> int:
    return exit_status("sweep", run, parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
