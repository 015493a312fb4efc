"""Compares the machine code of the CPU kernels with that of another revision.

    python tools/compare_machine_code.py 72e87a2

compiles the three levels of the revision and of the working tree with the flags of the build, and prints for each level
how many functions have the same instructions. Names are left out of the comparison: functions are matched by their
instructions first, and only what is left over is matched by name, so that a rename alone changes nothing. Objects of
the revision are kept under ``build/machine_code``.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("base", "avx2", "avx512")
FLAGS = ("-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fwrapv", "-fvisibility=hidden", "-fPIC", "-w")
SOURCES = ("csrc/cpu/levels/{}.cpp", "csrc/level_{}.cpp")  # of a level: now, and up to 72e87a2


def compile_levels(tree: Path, folder: Path) -> None:
    """Compile each level of a tree into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for level in LEVELS:
        source = next(path for path in (tree / name.format(level) for name in SOURCES) if path.exists())
        made = folder / f"{level}.o"
        partial = made.with_suffix(".partial")
        subprocess.run(["g++", *FLAGS, f"-I{tree / 'csrc'}", "-c", source, "-o", partial], check=True)
        partial.rename(made)


def compile_revision(revision: str) -> Path:
    """Compile the levels of a revision, unless that was done before."""
    commit = subprocess.check_output(["git", "-C", ROOT, "rev-parse", f"{revision}^{{commit}}"], text=True).strip()
    folder = ROOT / "build" / "machine_code" / commit
    if not all((folder / f"{level}.o").exists() for level in LEVELS):
        with tempfile.TemporaryDirectory() as tree:
            archive = subprocess.check_output(["git", "-C", ROOT, "archive", commit, "csrc"])
            subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
            compile_levels(Path(tree), folder)
    return folder


def functions(made: Path) -> dict[str, tuple[str, ...]]:
    """The instructions of each function of an object, without addresses and without the names they refer to."""
    listing = subprocess.check_output(["objdump", "-dr", "--no-show-raw-insn", "-C", made], text=True)
    found: dict[str, list[str]] = {}
    name, start = "", 0
    for line in listing.splitlines():
        if header := re.match(r"([0-9a-f]+) <(.*)>:$", line):
            name, start = header[2], int(header[1], 16)
            while name in found:
                name += "'"
            found[name] = []
        elif code := re.match(r"\s+[0-9a-f]+:\t(.*)", line):
            found[name].append(without_names(code[1], start))
    return {name: without_padding(body) for name, body in found.items()}


def without_names(code: str, start: int) -> str:
    """One instruction or relocation: jumps relative to the function's start, names of symbols removed."""
    if relocation := re.match(r"(?:[0-9a-f]+: )?(R_X86_64_\w+)\s", code):
        return relocation[1]
    code = re.sub(r"\s+# .*", "", code).strip()
    if jump := re.match(r"(j\w+|call|loop\w*)\s+([0-9a-f]+) <.*>$", code):
        return f"{jump[1]} {int(jump[2], 16) - start:+#x}"
    return re.sub(r"\s*<.*>$", "", code)


def without_padding(body: list[str]) -> tuple[str, ...]:
    while body and re.match(r"(data16 |cs )*(nop|xchg +%ax,%ax)", body[-1]):
        body.pop()
    return tuple(body)


def compare(before: dict[str, tuple[str, ...]], after: dict[str, tuple[str, ...]]) -> list[str]:
    """One line with the counts, then one for each function that has no equal on the other side."""
    same = Counter(before.values()) & Counter(after.values())

    def unmatched(side: dict[str, tuple[str, ...]]) -> dict[str, int]:
        left = Counter(same)
        rest = {}
        for name, body in side.items():
            left[body] -= 1
            if left[body] < 0:
                rest[name] = len(body)
        return rest

    gone, new = unmatched(before), unmatched(after)
    counts = f"{len(before)} → {len(after)} functions, {same.total()} identical"
    instructions = f"{sum(map(len, before.values()))} → {sum(map(len, after.values()))} instructions"
    lines = [f"{counts}, {len(gone)} → {len(new)} differ; {instructions}"]
    for name in sorted(gone | new):
        lines.append(f"  {gone.get(name, '-'):>6} → {new.get(name, '-'):>6}  {name[:160]}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the revision to compare with")
    base = compile_revision(parser.parse_args().base)
    differ = False
    with tempfile.TemporaryDirectory() as folder:
        compile_levels(ROOT, Path(folder))
        for level in LEVELS:
            lines = compare(functions(base / f"{level}.o"), functions(Path(folder) / f"{level}.o"))
            print(f"{level}: " + "\n".join(lines))
            differ = differ or len(lines) > 1
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
