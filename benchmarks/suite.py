"""The full benchmark, in one command: `make bench-full`.

Every candidate is verified against float64, then all are timed in turn, beside the ceilings of the machine. Writes
results/full/suite.json, suite.md and pictures, and prints for each promised speed-up whether it was met.
"""

import argparse
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import overhead, report
from benchmarks.cases import NATIVE, Group, Setting
from benchmarks.ceiling import DTYPES, Ceiling
from benchmarks.claims import MANY_QUERIES, verdicts
from benchmarks.timing import keep_freed_memory, pin
from fastkm.cli.console import add_threads, check_writable, duration, exit_status, progress, whole_number
from fastkm.cli.machine import machine
from fastkm.testing.extras import import_extra
from fastkm.testing.operations import GRADIENT_CASES, KERNEL_OPERATIONS, Case
from fastkm.testing.presets import LARGE, PRESETS

# ---- the plan ------------------------------------------------------------------------------------------------------


def cases_of(families: list[str], forward: bool) -> list[Case]:
    """The operations named, then those with a gradient again with it, unless ``forward`` leaves gradients out."""
    gradients = [] if forward else [case for case in GRADIENT_CASES if case.operation in families]
    return [*map(Case, families), *gradients]


def groups(options: argparse.Namespace) -> list[Setting]:
    """Every family and preset; what takes minutes at the largest presets is left to a call that names it."""
    settings = []
    for name in options.presets or PRESETS:
        for batch in options.batch or (1, 16, 256):
            if options.batch is None and batch > 16 and name in LARGE:
                continue
            for case in cases_of(options.families, options.forward):
                if options.presets is None and case.gradient and (name in LARGE or batch > 16):
                    continue
                compile = options.compile and batch == 16
                settings.append(Setting(case, PRESETS[name], batch, compile=compile))
    if "float64" in options.dtypes:
        few = [s for s in settings if s.batch == 16 and s.preset.name in ("S", "M")]
        chosen = few if options.batch is None else settings
        doubles = [setting._replace(dtype="float64", compile=False) for setting in chosen]
    else:
        doubles = []
    singles = list(settings) if "float32" in options.dtypes else []
    if "read" in options.families and "float32" in options.dtypes:
        singles += [Setting(Case("read"), PRESETS[name], 1, queries=MANY_QUERIES)
                    for name in options.presets or ("S", "M", "L") if name not in LARGE]  # fmt: skip
    alone = Setting(Case("write"), PRESETS["S"], 1)  # promised, so never left out
    if "write" in options.families and "float32" in options.dtypes and alone not in settings:
        singles.append(alone)
    return singles + doubles


SWEPT = ("write", "update_posterior", "read")
SWEEPS = {  # from preset S with B = 16, one letter at a time
    "B": (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "T": (16, 32, 64, 128, 256, 512, 1024),
    "K": (16, 32, 64, 128, 256),
    "C": (32, 64, 128, 256, 512, 1024),
}


def sweep_settings(options: argparse.Namespace) -> list[tuple[str, int, Setting]]:
    settings = []
    for letter, sizes in SWEEPS.items():
        for size in sizes:
            batch = size if letter == "B" else 16
            preset = PRESETS["S"]._replace(name=f"{letter} = {size}", **({letter: size} if letter != "B" else {}))
            for operation in SWEPT:
                if operation in options.families and not (letter == "T" and operation == "read"):
                    settings.append((letter, size, Setting(Case(operation), preset, batch, synthetic=True)))
    return settings


# ---- the command ---------------------------------------------------------------------------------------------------


def measure_groups(options: argparse.Namespace, ceiling: Ceiling) -> list[dict[str, Any]]:
    settings, found, known = groups(options), [], {}
    with progress("bench-full", len(settings)) as start:
        for s in settings:
            key = s.case, s.preset, s.dtype, s.queries
            start(f"{s.case}, preset {s.preset.name}, B = {s.batch}, Q = {s.queries}, {s.dtype}")
            group = Group(s, {name: t * s.batch for name, t in known.get(key, {}).items()}, options.compile_limit)
            group.time(options.seconds)
            found.append(group.result())
            known[key] = {r["candidate"]: r["seconds"]["median"] / s.batch
                          for r in found[-1]["candidates"] if "seconds" in r}  # fmt: skip
            if time.monotonic() - ceiling.last > 60:
                ceiling.measure(1)
    return found


def measure_sweeps(options: argparse.Namespace) -> list[dict[str, Any]]:
    settings, found = sweep_settings(options), []
    with progress("against one size", len(settings), seconds=5) as start:
        for letter, size, setting in settings:
            start(f"{setting.case}, {setting.preset.name}")
            shown = (NATIVE, report.EAGER_OF_SWEEPS[setting.case.operation])
            group = Group(setting, {}, options.compile_limit, only=shown)
            group.time(options.seconds / 4)
            found.append({"letter": letter, "size": size, **group.result()})
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-full", description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, metavar="NAME", help="(default: all)")
    parser.add_argument("--families", nargs="+", choices=KERNEL_OPERATIONS, default=list(KERNEL_OPERATIONS),
                        metavar="NAME", help=f"of {', '.join(KERNEL_OPERATIONS)} (default: all)")  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=whole_number(1), metavar="B", help="memories (default: 1 16 256)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: both)")
    parser.add_argument("--seconds", type=duration, default=2.0, help="of timing a group (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=("groups", "sweeps", "calls"), metavar="NAME",
                        default=("groups", "sweeps", "calls"), help="(default: groups sweeps calls)")  # fmt: skip
    parser.add_argument("--forward", action="store_true", help="no gradients")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile")
    parser.add_argument("--compile-limit", type=whole_number(0), default=120, help="seconds a compilation may take")
    add_threads(parser)
    parser.add_argument("--output", type=Path, default=Path("results/full"), metavar="FOLDER")
    return parser


def run(options: argparse.Namespace) -> int:
    begin = time.perf_counter()
    check_writable(*(options.output / name for name in report.RESULTS))
    import_extra("matplotlib")  # pictures are drawn at the end
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")  # torch about itself
    pinned, ceiling = pin(options.threads), Ceiling()
    about = {**machine(), "pinned": pinned, "freed memory": keep_freed_memory()}
    about |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    print(*(f"{name:<18} {value}" for name, value in about.items()), sep="\n")
    ceiling.measure()
    print(f"{'ceilings':<18} {ceiling.describe()}")
    data: dict[str, Any] = {"machine": about, "groups": [], "sweeps": [], "calls": {}}
    if "groups" in options.sections:
        data["groups"] = measure_groups(options, ceiling)
    if "sweeps" in options.sections:
        data["sweeps"] = measure_sweeps(options)
    if "calls" in options.sections:
        data["calls"] = overhead.measure()
    ceiling.measure()
    about["minutes"] = round((time.perf_counter() - begin) / 60, 1)
    data["ceiling"] = {"product": ceiling.product, "bandwidth": ceiling.bandwidth, "history": ceiling.history}
    report.add_percentages(data)
    data["claims"] = [claim._asdict() for claim in verdicts(data)]
    report.write(data, ceiling.describe(), options.output)
    failed = [r for g in data["groups"] for r in g["candidates"] if r["status"] == "failed" and r["kind"] == NATIVE]
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    return exit_status("bench-full", run, parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
