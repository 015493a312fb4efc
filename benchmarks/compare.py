"""The kernels of two revisions against each other: `make bench-compare BASE=<revision>`.

Checks the other revision out beside this one, builds it there, and times the same inputs in two processes that take
turns; this revision a second time, to see how much two timings of one thing differ. Ratios are taken turn by turn.
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
from pathlib import Path
from typing import Any

import torch
from suite import FAMILIES, Case, episode
from timing import LARGEST_GAP, SHORTEST, pin

from fastkm.cli.console import markdown_table, progress, show_table
from fastkm.cli.machine import machine
from fastkm.testing.extras import UserError
from fastkm.testing.gradients import GRADIENT, INPUTS
from fastkm.testing.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "compare"  # one folder a revision, kept for the next comparison
LEAST_TURNS = 9
HEADERS = (
    "operation",
    "preset",
    "B",
    "base ms",
    "this ms",
    "base / this",
    "quartiles",
    "this / this",
    "turns",
    "differ",
)


def git(*words: str) -> str:
    done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def build(revision: str) -> Path:
    """A folder with the package of ``revision``, built for the CPU."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    folder = BUILT / commit[:12]
    if not (folder / ".git").exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(folder), commit)
    print(f"{'base':<18} {revision}, {git('log', '-1', '--format=%h %s', commit)}", flush=True)
    if not list((folder / "fastkm").glob("_C*.so")):
        print("building it, a few minutes ...", flush=True)
        command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"FASTKM_CUDA": "0"}, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"{revision} does not build:\n{done.stderr[-2000:]}")
    return folder


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

    def seconds(self, operation: str, calls: int) -> float:
        return float(self.ask("time", operation, calls))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def turns(base: Worker, this: Worker, operation: str, seconds: float) -> list[dict[str, float]]:
    """Seconds a call of base, this and this again, in an order drawn anew every turn."""
    takes = max(worker.seconds(operation, 1) for worker in (base, this))
    calls, draw, taken = max(1, math.ceil(SHORTEST / takes)), random.Random(0), []
    who = {"base": base, "this": this, "again": this}
    begin = time.perf_counter()
    while len(taken) < LEAST_TURNS or time.perf_counter() - begin < seconds:
        order = draw.sample(list(who), len(who))
        taken.append({name: who[name].seconds(operation, calls) for name in order})
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


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Of any tensor, relative to its largest entry."""
    gaps = [((x.double() - y.double()).abs().max() / y.double().abs().max().clamp_min(1e-300)).item()
            for x, y in zip(one, other, strict=True) if x.numel()]  # fmt: skip
    return max(gaps)


def row(record: dict[str, Any]) -> tuple[str, ...]:
    where = (record["operation"], record["preset"], str(record["batch"]))
    times = (f"{1e3 * record['seconds'][name]:.4g}" for name in ("base", "this"))
    ratio = "void" if record["void"] else f"{record['ratio']:.3f}"
    spread = f"{record['lower']:.3f} … {record['upper']:.3f}"
    return (*where, *times, ratio, spread, f"{record['own']:.3f}", str(record["turns"]), f"{record['differ']:.0e}")


def measure(base: Worker, this: Worker, options: argparse.Namespace) -> list[dict[str, Any]]:
    operations = [*options.families, *(f + GRADIENT for f in options.families if f in INPUTS and not options.forward)]
    cases = [Case(operation, PRESETS[name], batch, options.dtype)
             for name in options.presets for batch in options.batch for operation in operations]  # fmt: skip
    records = []
    with progress("compare", len(cases)) as start, tempfile.TemporaryDirectory() as folder:
        inputs, results = Path(folder) / "inputs.pt", [Path(folder) / f"{name}.pt" for name in ("base", "this")]
        loaded = None
        for case in cases:
            start(f"{case.operation}, preset {case.preset.name}, B = {case.batch}")
            if loaded != (case.preset, case.batch):
                e = episode(case)._asdict()
                del e["clean"]
                torch.save({name: tuple(x) if isinstance(x, tuple) else x for name, x in e.items()}, inputs)
                for worker in (base, this):
                    worker.ask("load", inputs)
                loaded = case.preset, case.batch
            for worker, file in zip((base, this), results, strict=True):
                worker.ask("run", case.operation, file)
            differ = largest_difference(*map(torch.load, results))
            taken = summarise(turns(base, this, case.operation, options.seconds))
            if taken["void"]:
                taken = summarise(turns(base, this, case.operation, 2 * options.seconds))
            about = {"operation": case.operation, "preset": case.preset.name, "batch": case.batch}
            records.append({**about, "differ": differ, **taken})
    return records


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-compare", description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="a revision of this repository")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["S", "M", "L"], metavar="NAME")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--batch", nargs="+", type=int, default=[16], metavar="B")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each comparison (default: %(default)s)")
    parser.add_argument("--forward", action="store_true", help="no gradients")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "compare", metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        about = {**machine(), "pinned": pin(options.threads)}  # workers inherit the cores
        print(*(f"{name:<18} {value}" for name, value in about.items()), sep="\n")
        folder = build(options.base)
        base, this = Worker(folder, options.threads), Worker(ROOT, options.threads)
        records = measure(base, this, options)
        base.close(), this.close()
    except UserError as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 2
    title = f"{options.base} against this tree, {options.dtype}; above 1 this tree is faster"
    rows = [row(record) for record in records]
    show_table(title, HEADERS, rows, right=HEADERS[2:], group=1)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    report = {"machine": about, "settings": settings, "records": records}
    (options.output / "compare.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "compare.md").write_text(f"{title}\n\n{markdown_table(HEADERS, rows)}\n")
    print(f"Wrote {options.output}/compare.json and compare.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
