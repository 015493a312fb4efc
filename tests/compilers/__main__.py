"""Tests of the CPU kernels as other compilers build them: ``python -m compilers [COMPILER ...]`` in ``tests``.

Without a name, every compiler of ``build.COMPILERS`` that is installed is taken. Each level of a compiler is built into
a program without torch, and that program answers the operators while the tests of the families run. The kernels of
aarch64 run under an emulator. A level that this processor lacks is built and not run.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from compilers import build

FAMILIES = (
    *("gradients", "posterior", "out", "filtering", "writing", "streaming", "removal", "square_root"),
    *("reading", "addressing", "factored", "matrix_normal"),
)
# All that the kernels compute, at every shape but the largest presets. The refusals are the work of the bindings.
WHOLE = (
    *(f"tests/test_{family}.py" for family in FAMILIES),
    "-k=(native or gradients) and not refuse and not opcheck and not rounding_grows and not XL and not LLM",
)
# The same theorems once each: a tenth of the time.
CORE = (
    "tests/test_gradients.py",
    "tests/test_registration.py",
    "-k=equals_the_reference or same_bits or (every_instruction_set and base)",
)
HIGHEST = {"AVX512": "avx512", "AVX2": "avx2"}  # as torch names what the processor has


def runs_here(level: str) -> bool:
    highest = HIGHEST.get(torch.backends.cpu.get_cpu_capability(), "base")
    return level == "neon" or build.LEVELS.index(level) <= build.LEVELS.index(highest)


def timed(command: list[str]) -> tuple[int, float]:
    begin = time.perf_counter()
    return subprocess.run(command, cwd=build.ROOT).returncode, time.perf_counter() - begin


def build_driver(one: build.Build) -> float:
    begin = time.perf_counter()
    build.compile_program(one, build.DRIVER)
    return time.perf_counter() - begin


def installed(named: list[str]) -> list[str]:
    """The compilers to take. One that was named has to be there; of the others, those that are not are named."""
    taken: dict[Path, str] = {}  # under two names a compiler is taken once
    for compiler in named or build.COMPILERS:
        try:
            found = Path(build.require(compiler)).resolve()
            if compiler == build.CROSS:
                build.require(build.EMULATOR)
            taken.setdefault(found, compiler)
        except build.Missing as error:
            if named:
                raise SystemExit(f"fastkm: {error}") from None
            print(f"{compiler}: left out; {error}", flush=True)
    return list(taken.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m compilers", description=__doc__)
    parser.add_argument("compilers", nargs="*", metavar="COMPILER", help=f"one of {', '.join(build.COMPILERS)}, or any")
    parser.add_argument("--whole", action="store_true", help="all tests of the families; without it each theorem once")
    options = parser.parse_args()
    builds = [build.Build(c, level) for c in installed(options.compilers) for level in build.levels_of(c)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seconds = dict(zip(builds, pool.map(build_driver, builds), strict=True))
    failed = False
    for one in builds:
        print(f"\n{one}: built in {seconds[one]:.0f} s", flush=True)
        if not runs_here(one.level):
            print(f"{one}: not run, this processor has no {one.level}", flush=True)
            continue
        tests = WHOLE if options.whole else CORE
        status, taken = timed([sys.executable, "-m", "pytest", "-n", "auto", f"--cpu-kernels={one}", *tests])
        print(f"{one}: {'FAILED' if status else 'passed'} in {taken:.0f} s", flush=True)
        failed = failed or status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
