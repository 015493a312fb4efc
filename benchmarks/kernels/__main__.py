"""Single CPU kernels of two revisions in turn, without torch around them: ``python -m benchmarks.kernels BASE``.

The kernels of one instruction level of each revision are built into a library around ``time_kernels.cpp``, with the
flags of setup.py. Both libraries run in this process, on one core and one thread, in an order drawn anew every turn;
this tree runs twice, to see how much two timings of one thing differ. With BASE = HEAD and ``--flags`` two builds of
one revision are compared.
"""

import argparse
import ctypes
import shlex
import subprocess
from pathlib import Path

import torch

from benchmarks.compare import BUILT, COLUMNS, ROOT, Clock, cells, check_out, time_both
from benchmarks.timing import pin
from fastkm.cli.console import duration, exit_status, progress, show_table, whole_number
from fastkm.testing.extras import UserError
from fastkm.testing.presets import PRESETS, Preset

PROGRAM = Path(__file__).with_name("time_kernels.cpp")
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-fPIC", "-shared")
KERNELS = tuple(
    kernel + backward
    for kernel in ("update_posterior", "write", "read", "kl_memory", "logdet")
    for backward in ("", "_backward")
)
LEVELS = {"DEFAULT": "base", "AVX2": "avx2", "AVX512": "avx512"}  # as torch calls them, and as csrc does
BATCH, QUERIES = 16, 32
HEADERS = ("kernel", "preset", "base µs", "this µs", *COLUMNS)


def find_source(tree: Path, *places: str) -> Path:
    """The first of ``places`` that the tree has: files have moved between revisions."""
    for place in places:
        if (tree / "csrc" / place).exists():
            return tree / "csrc" / place
    raise UserError(f"{tree} has none of {', '.join(places)} in csrc")


def build_library(tree: Path, name: str, level: str, flags: list[str]) -> ctypes.CDLL:
    source = find_source(tree, f"cpu/levels/{level}.cpp", f"level_{level}.cpp")
    arena = find_source(tree, "cpu/linalg/arena.cpp", "arena.cpp")
    defined = {"FASTKM_LEVEL_NAME": level, "FASTKM_LEVEL_SOURCE": f'"{source}"', "FASTKM_ARENA_SOURCE": f'"{arena}"'}
    library = BUILT / f"kernels-{name}-{level}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    command = ["g++", *FLAGS, *flags, f"-I{tree / 'csrc'}", *(f"-D{key}={value}" for key, value in defined.items())]
    print(f"building {name} ...", flush=True)
    command += ["-o", str(library), str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"the kernels in {tree} do not build:\n{done.stderr[-2000:]}")
    return ctypes.CDLL(str(library))


def clock(library: ctypes.CDLL, kernel: str, preset: Preset, batch: int) -> Clock:
    """Seconds a memory."""
    library.seconds_a_call.restype = ctypes.c_double
    sizes = (ctypes.c_int64 * 5)(batch, preset.K, preset.C, preset.T, QUERIES)
    return lambda calls: library.seconds_a_call(kernel.encode(), sizes, ctypes.c_int64(calls)) / batch


def run(options: argparse.Namespace) -> int:
    print(f"{'pinned':<18} {pin(1)}")
    base = build_library(check_out(options.base), "base", options.level, [])
    this = build_library(ROOT, "this", options.level, shlex.split(options.flags))
    rows = []
    with progress("kernels", len(options.kernels) * len(options.presets)) as start:
        for kernel in options.kernels:
            for preset in (PRESETS[name] for name in options.presets):
                start(f"{kernel}, preset {preset.name}")
                clocks = (clock(library, kernel, preset, options.batch) for library in (base, this))
                rows.append((kernel, preset.name, *cells(time_both(*clocks, options.seconds), 1e6)))
    title = (
        f"{options.base} against this tree, {options.level}, float32, one thread, B = {options.batch}, Q = {QUERIES}; "
        "µs a memory; above 1 this tree is faster"
    )
    show_table(title, HEADERS, rows, right=HEADERS[2:], group=0)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="a revision of this repository")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, metavar="NAME",
                        help=f"of {', '.join(KERNELS)} (default: all)")  # fmt: skip
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["S", "M", "L"], metavar="NAME")
    parser.add_argument("--level", choices=LEVELS.values(), default=LEVELS[torch.backends.cpu.get_cpu_capability()],
                        help="instruction set (default: the best of this processor)")  # fmt: skip
    parser.add_argument("--batch", type=whole_number(1), default=BATCH, help="memories (default: %(default)s)")
    parser.add_argument("--flags", default="", help="of the compiler, for this tree alone")
    parser.add_argument("--seconds", type=duration, default=1.0,
                        help="of each comparison (default: %(default)s)")  # fmt: skip
    return exit_status("benchmarks.kernels", run, parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
