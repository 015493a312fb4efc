"""Compare the machine code of the CUDA kernels in two builds: ``python tools/compare_cuda_code.py OLD.so NEW.so``.

For every kernel and target the table shows what differs between the builds, "old -> new": registers of a thread, loads
and stores of spilled registers, tensor-core instructions, 128-bit loads, float atomics, and all instructions. Nothing
is run. The exit status is 1 if a kernel is missing, spills more, or has fewer tensor-core instructions or wide loads.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cuda_code  # noqa: E402
from cuda_code import Code  # noqa: E402

from fastkm.cli.console import markdown_table  # noqa: E402

COLUMNS = ("registers", "spills", "tensor_cores", "wide_loads", "float_atomics", "instructions")


def row(target: str, old: Code, new: Code) -> tuple[str, ...]:
    cells = (
        str(was) if (was := getattr(old, column)) == (now := getattr(new, column)) else f"{was} -> {now}"
        for column in COLUMNS
    )
    return (f"`{old.kernel}`", target, *cells)


def worse(old: Code, new: Code) -> bool:
    return new.spills > old.spills or new.tensor_cores < old.tensor_cores or new.wide_loads < old.wide_loads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD.so")
    parser.add_argument("new", type=Path, metavar="NEW.so")
    parser.add_argument("--targets", nargs="+", default=cuda_code.TARGETS, choices=cuda_code.TARGETS)
    parser.add_argument("--all", action="store_true", help="also print kernels with equal counts")
    options = parser.parse_args()
    rows, equal, failures = [], 0, []
    for target in options.targets:
        old, new = (
            {code.kernel: code for code in cuda_code.kernels(target, library)} for library in (options.old, options.new)
        )
        failures += [f"{name} {target}: only in one build" for name in sorted(old.keys() ^ new.keys())]
        for name in sorted(old.keys() & new.keys()):
            equal += old[name] == new[name]
            if options.all or old[name] != new[name]:
                rows.append(row(target, old[name], new[name]))
            if worse(old[name], new[name]):
                failures.append(f"{name} {target}: {old[name]} -> {new[name]}")
    if rows:
        print(markdown_table(("kernel", "target", *(column.replace("_", " ") for column in COLUMNS)), rows))
    print(f"{equal} of {equal + sum(1 for cells in rows if any('->' in cell for cell in cells))} have equal counts")
    print("\n".join(failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
