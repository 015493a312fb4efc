"""Options and exit status of a command, tables and progress: with rich where it is installed, else plain text."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fastkm.testing.extras import UserError

WIDTH = 140  # columns of a table that goes to a file or a pipe


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, at least ``least``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}; got {text!r}")
        return int(text)

    return parse


def add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=whole_number(1), default=torch.get_num_threads(),
                         help="threads, pinned (default: %(default)s)")  # fmt: skip


def exit_status(program: str, run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The exit status of a command; an error that the user can put right is printed in one line and gives 2."""
    try:
        return run(options)
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2


def show_table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    group: int | None = None,
) -> None:
    """Print ``rows``; the columns named in ``right`` are numbers. A row that is FAILED stands out.

    A line is drawn wherever the column ``group`` changes.
    """
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        show_plain_table(title, headers, rows)
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        ends = group is not None and after is not None and row[group] != after[group]
        table.add_row(*row, style="bold red" if "FAILED" in row else None, end_section=ends)
    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False).print(table)


def show_plain_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    print(title)
    for row in (headers, ["-" * width for width in widths], *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (headers, ["---"] * len(headers), *rows))


@contextmanager
def progress(title: str, steps: int, done: int = 0, seconds: float = 0) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with the words for each step: a bar on a terminal, a line a step elsewhere.

    Elsewhere, lines are at least ``seconds`` apart.
    """
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        Progress = None  # type: ignore[assignment,misc]
    if Progress is None or not sys.stdout.isatty():
        number, printed = done, -math.inf

        def line(step: str) -> None:
            nonlocal number, printed
            number += 1
            if time.monotonic() - printed >= seconds:
                printed = time.monotonic()
                print(f"{title} {number:,}/{steps:,}: {step}", flush=True)

        yield line
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=steps, completed=done)

        def start(step: str) -> None:
            bar.update(task, description=step, advance=1 if bar.tasks[task].description else 0)

        yield start
        bar.update(task, completed=steps)
