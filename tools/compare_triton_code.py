"""Compare the machine code of every Triton kernel with that of another revision: ``compare_triton_code.py BASE``.

Both revisions are compiled ahead of time for every target, as their own launchers would launch them, and counted by
this revision's ``tests/gpu/aot.py``. A row is printed for each kernel whose counts differ, and a summary at the end.
Nothing is launched, so no GPU is needed. The comparison takes a few minutes on two cores.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
COUNTS = ("registers", "occupancy", "spills", "shared", "tensor_cores", "wide_loads", "loads", "instructions")
# Counts that are worse when they grow, and when they fall. Registers matter by the occupancy that they leave.
COSTS, GAINS = ("spills", "shared"), ("occupancy", "tensor_cores", "wide_loads")

Counts = dict[str, dict[str, float]]  # by target, kernel and call


def measure(targets: list[str]) -> Counts:
    """Counts of every kernel of the revision on ``PYTHONPATH``, by target, kernel and use."""
    specification = importlib.util.spec_from_file_location("measuring", ROOT / "tests" / "gpu" / "aot.py")
    measuring = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(measuring)
    from gpu import aot, launches

    aot.build = measuring.build
    found: Counts = {}
    for target in targets:
        for row in launches.rows(target):
            name = f"{target} {row.kernel} {row.operator} {row.preset} {row.precision}"
            name += f" #{sum(known.startswith(name + ' #') for known in found)}"  # launches of one call, in order
            found[name] = {count: getattr(row.built, count) for count in COUNTS}
    return found


def measure_revision(tree: Path, targets: list[str]) -> Counts:
    """``measure`` in a process that imports the packages of ``tree``."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, "--measure", *targets]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=tree, env=environment).stdout
    return json.loads(printed)


def measure_base(base: str, targets: list[str]) -> Counts:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--detach", tree, base], check=True, cwd=ROOT, capture_output=True)
        try:
            return measure_revision(tree, targets)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], check=True, cwd=ROOT)


def is_worse(before: dict[str, float], after: dict[str, float]) -> bool:
    return any(after[x] > before[x] for x in COSTS) or any(after[x] < before[x] for x in GAINS)


def print_table(before: Counts, after: Counts) -> None:
    print("| kernel |", " | ".join(COUNTS), "|")
    print("| --- |", " | ".join("---" for _ in COUNTS), "|")
    common = [name for name in before if name in after]
    for name in common:
        if before[name] != after[name]:
            pairs = [(before[name][count], after[name][count]) for count in COUNTS]
            cells = [str(x) if x == y else f"{x} → {y}" for x, y in pairs]
            mark = " **worse**" if is_worse(before[name], after[name]) else ""
            print(f"| {name}{mark} |", " | ".join(cells), "|")
    unequal = [name for name in common if before[name] != after[name]]
    worse = [name for name in common if is_worse(before[name], after[name])]
    instructions = [sum(counts[name]["instructions"] for name in common) for counts in (before, after)]
    print(f"\n{len(common)} kernels compared, {len(common) - len(unequal)} with equal counts, {len(worse)} worse.")
    print("Instructions in total: {:,} → {:,}.".format(*instructions))
    for revision, names in (("base", set(before) - set(after)), ("this revision", set(after) - set(before))):
        if names:
            print(f"Only in {revision}: {', '.join(sorted(names))}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="a revision of this repository")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--base-counts", type=Path, help="keep the counts of the base in this file and read them again")
    parser.add_argument("--measure", nargs="+", metavar="TARGET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    if options.base is None:
        parser.error("name a revision to compare with")
    kept = options.base_counts
    if kept and kept.exists():
        before = json.loads(kept.read_text(encoding="utf-8"))
    else:
        before = measure_base(options.base, options.targets)
        if kept:
            kept.write_text(json.dumps(before), encoding="utf-8")
    after = measure_revision(ROOT, options.targets)
    print_table({name: x for name, x in before.items() if name.split()[0] in options.targets}, after)


if __name__ == "__main__":
    main()
