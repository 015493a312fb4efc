"""The package of two revisions compared: `make bench-compare BASE=<revision>`.

Checks the other revision out beside this one, builds it there, and times the same inputs in two processes that take
turns, this revision twice, to see how much two timings of one thing differ. Ratios are taken turn by turn. With
`--overhead` the calls are on one entry, where the time is that of checks, dispatch and wrapping.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Setting, episode
from benchmarks.compare_worker import one_entry_calls
from benchmarks.suite import cases_of
from benchmarks.timing import LARGEST_GAP, pin
from fastkm._files import write_text
from fastkm.cli.console import (
    add_threads,
    check_writable,
    duration,
    exit_status,
    markdown_table,
    progress,
    show_table,
    whole_number,
)
from fastkm.cli.machine import machine
from fastkm.testing.extras import UserError
from fastkm.testing.operations import KERNEL_OPERATIONS, Case
from fastkm.testing.presets import PRESETS
from fastkm.testing.timing import SHORTEST

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "compare"  # one folder a revision, kept for the next comparison
LEAST_TURNS = 9
COLUMNS = ("base / this", "quartiles", "this / this", "turns")
HEADERS = ("operation", "preset", "B", "base ms", "this ms", *COLUMNS, "differ")
OVERHEAD_HEADERS = ("operation", "numbers as", "base µs", "this µs", *COLUMNS)


def git(*words: str) -> str:
    done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def check_out(revision: str) -> Path:
    """A folder with the files of ``revision``."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    folder = BUILT / commit[:12]
    if not (folder / ".git").exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(folder), commit)
    print(f"{'base':<18} {revision}, {git('log', '-1', '--format=%h %s', commit)}", flush=True)
    return folder


def build(revision: str) -> Path:
    """A folder with the package of ``revision``, built for the CPU."""
    folder = check_out(revision)
    if not list((folder / "fastkm").glob("_C*.so")):
        print("building it, a few minutes ...", flush=True)
        command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"FASTKM_CUDA": "0"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            raise UserError(f"{revision} does not build:\n{done.stderr[-2000:]}")
    return folder


Clock = Callable[[int], float]  # makes so many calls and returns the seconds of one


class Worker:
    """The package in ``folder``, in a process that waits for its turn."""

    def __init__(self, folder: Path, threads: int) -> None:
        command = (sys.executable, str(Path(__file__).with_name("compare_worker.py")), str(threads))
        environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        loaded = Path(self.process.stdout.readline().strip())
        if folder.resolve() not in loaded.resolve().parents:
            raise UserError(f"the process for {folder} has loaded {loaded}")

    def ask(self, *words: object) -> str:
        self.process.stdin.write("\t".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise UserError(f"the process for {' '.join(map(str, words))} ended with {self.process.wait()}")
        return answer

    def clock(self, *what: str) -> Clock:
        return lambda calls: float(self.ask(*what, calls))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def gradient_word(case: Case) -> str:
    return "gradient" if case.gradient else "forward"


def take_turns(base: Clock, this: Clock, seconds: float) -> list[dict[str, float]]:
    """Seconds a call of base, this and this again, in an order drawn anew every turn."""
    slower = max(base(1), this(1))
    calls, draw, taken = max(1, math.ceil(SHORTEST / slower)), random.Random(0), []
    who = {"base": base, "this": this, "again": this}
    begin = time.perf_counter()
    while len(taken) < LEAST_TURNS or time.perf_counter() - begin < seconds:
        order = draw.sample(list(who), len(who))
        taken.append({name: who[name](calls) for name in order})
    return taken


def summarise(taken: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and the quartiles of the ratio within each turn; void if this revision differs from itself."""
    lower, ratio, upper = statistics.quantiles([t["base"] / t["this"] for t in taken], n=4, method="inclusive")
    own = statistics.median(t["again"] / t["this"] for t in taken)
    medians = {name: statistics.median(t[name] for t in taken) for name in taken[0]}
    void = max(own, 1 / own) - 1 > LARGEST_GAP
    return {
        "seconds": medians,
        "ratio": ratio,
        "lower": lower,
        "upper": upper,
        "own": own,
        "turns": len(taken),
        "void": void,
    }


def time_both(base: Clock, this: Clock, seconds: float) -> dict[str, Any]:
    """A second time and twice as long if the first is void."""
    found = summarise(take_turns(base, this, seconds))
    return summarise(take_turns(base, this, 2 * seconds)) if found["void"] else found


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Of any tensor, relative to its largest entry."""
    gaps = [((x.double() - y.double()).abs().max() / y.double().abs().max().clamp_min(1e-300)).item()
            for x, y in zip(one, other, strict=True) if x.numel()]  # fmt: skip
    return max(gaps)


def cells(record: dict[str, Any], scale: float) -> tuple[str, ...]:
    """Both times in units of 1 / ``scale`` seconds, and :data:`COLUMNS`."""
    times = (f"{scale * record['seconds'][name]:.4g}" for name in ("base", "this"))
    ratio = "void" if record["void"] else f"{record['ratio']:.3f}"
    spread = f"{record['lower']:.3f} … {record['upper']:.3f}"
    return (*times, ratio, spread, f"{record['own']:.3f}", str(record["turns"]))


def row(record: dict[str, Any]) -> tuple[str, ...]:
    case = Case(record["operation"], record["gradient"])
    where = (str(case), record["preset"], str(record["batch"]))
    return (*where, *cells(record, 1e3), f"{record['differ']:.0e}")


def overhead_row(record: dict[str, Any]) -> tuple[str, ...]:
    return (record["operation"], record["given"], *cells(record, 1e6))


def measure(base: Worker, this: Worker, options: argparse.Namespace) -> list[dict[str, Any]]:
    settings = [Setting(case, PRESETS[name], batch, options.dtype)
                for name in options.presets for batch in options.batch
                for case in cases_of(options.families, options.forward)]  # fmt: skip
    records = []
    with progress("compare", len(settings)) as start, tempfile.TemporaryDirectory() as folder:
        inputs, results = Path(folder) / "inputs.pt", [Path(folder) / f"{name}.pt" for name in ("base", "this")]
        loaded = None
        for s in settings:
            start(f"{s.case}, preset {s.preset.name}, B = {s.batch}")
            if loaded != (s.preset, s.batch):
                e = episode(s)._asdict()
                del e["clean"]
                torch.save({name: tuple(x) if isinstance(x, tuple) else x for name, x in e.items()}, inputs)
                for worker in (base, this):
                    worker.ask("load", inputs)
                loaded = s.preset, s.batch
            for worker, file in zip((base, this), results, strict=True):
                worker.ask("run", s.case.operation, gradient_word(s.case), file)
            differ = largest_difference(*map(torch.load, results))
            what = ("time", s.case.operation, gradient_word(s.case))
            found = time_both(base.clock(*what), this.clock(*what), options.seconds)
            records.append({**s.case._asdict(), "preset": s.preset.name, "batch": s.batch, "differ": differ, **found})
    return records


def measure_overhead(base: Worker, this: Worker, options: argparse.Namespace) -> list[dict[str, Any]]:
    calls, records = one_entry_calls(), []
    with progress("compare calls", len(calls)) as start:
        for operation, given in calls:
            start(f"{operation}, {given}")
            what = ("call", operation, given)
            found = time_both(base.clock(*what), this.clock(*what), options.seconds)
            records.append({"operation": operation, "given": given, **found})
    return records


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="make bench-compare", description=__doc__.partition("\n")[0])
    command.add_argument("base", help="a revision of this repository")
    command.add_argument("--presets", nargs="+", choices=PRESETS, default=["S", "M", "L"], metavar="NAME")
    command.add_argument("--families", nargs="+", choices=KERNEL_OPERATIONS, default=list(KERNEL_OPERATIONS),
                         metavar="NAME")  # fmt: skip
    command.add_argument("--batch", nargs="+", type=whole_number(1), default=[16], metavar="B")
    command.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    command.add_argument("--seconds", type=duration, default=2.0, help="of each comparison (default: %(default)s)")
    command.add_argument("--forward", action="store_true", help="no gradients")
    command.add_argument("--overhead", action="store_true", help="calls on one entry instead of the presets")
    add_threads(command)
    command.add_argument("--output", type=Path, default=ROOT / "results" / "compare", metavar="FOLDER")
    return command


def run(options: argparse.Namespace) -> int:
    name = "overhead" if options.overhead else "compare"
    results = options.output / f"{name}.json", options.output / f"{name}.md"
    check_writable(*results)
    about = {**machine(), "pinned": pin(options.threads)}  # workers inherit the cores
    print(*(f"{name:<18} {value}" for name, value in about.items()), sep="\n")
    folder = build(options.base)
    base, this = Worker(folder, options.threads), Worker(ROOT, options.threads)
    measured: Callable[..., list[dict[str, Any]]] = measure_overhead if options.overhead else measure
    records = measured(base, this, options)
    base.close(), this.close()
    headers, rows = (OVERHEAD_HEADERS, [overhead_row(r) for r in records]) if options.overhead else (
        HEADERS, [row(r) for r in records])  # fmt: skip
    what = "calls on B = T = K = C = Q = 1" if options.overhead else options.dtype
    title = f"{options.base} against this tree, {what}; above 1 this tree is faster"
    show_table(title, headers, rows, right=headers[2:], group=0 if options.overhead else 1)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    report = {"machine": about, "settings": settings, "records": records}
    write_text(results[0], json.dumps(report, indent=1) + "\n")
    write_text(results[1], f"{title}\n\n{markdown_table(headers, rows)}\n")
    print(f"Wrote {results[0]} and {results[1].name}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return exit_status("bench-compare", run, parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
