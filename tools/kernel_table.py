"""Fill the tables of docs/kernels.md: what the machine code of every GPU kernel shows. Run by `make kernels`.

Nothing is launched. The CUDA kernels are looked at in the extension as it was built; their launchers run against
``record_launches.cpp``, which writes launches down. The Triton kernels are compiled for each target as their launchers
would launch them.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import cuda_code  # noqa: E402
from simt import build as simt_build  # noqa: E402
from update_readme import update  # noqa: E402

from fastkm.cli.console import markdown_table  # noqa: E402
from fastkm.cli.presets import PRESETS, Preset  # noqa: E402
from fastkm.cli.roofline import OPERATORS, inputs  # noqa: E402

PAGE = ROOT / "docs" / "kernels.md"
PRESET, BATCH, QUERIES = PRESETS["L"], 64, 32  # shared memory and occupancy are told for this one
TF32 = 2
# Most shared memory a block may have, and multiprocessors: A100, H100, B200.
DEVICES = {"sm_80": (163 * 1024, 108), "sm_90": (227 * 1024, 132), "sm_100": (227 * 1024, 148)}
# operator -> the kernel it launches, where the name does not say it
KERNELS = {
    "update_posterior": "update_kernel",
    "update_posterior_backward": "update_backward_kernel",
    "solve_addressing": "read_kernel",
    "factor_addressing": "read_kernel",
    "solve_factored": "read_kernel",
    "kl_memory": "kl_kernel",
    "kl_memory_backward": "kl_backward_kernel",
}


class Launch(NamedTuple):
    blocks: int
    threads: int
    shared: int  # bytes


def kernel_of(operator: str) -> str:
    return KERNELS.get(operator, f"{operator}_kernel")


# ---- CUDA ----------------------------------------------------------------------------------------------------------


class Recorder:
    """The launchers of the CUDA kernels as ``torch.ops.fastkm_recorded``, on tensors of the CPU that nobody touches."""

    def __init__(self) -> None:
        folder = simt_build.build().parent
        objects = [*folder.glob("*_cuda.o"), *folder.glob("*_binding.o")]
        made, libraries = folder / "recorded.so", Path(torch.__file__).with_name("lib")
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-o", made]
        command += [ROOT / "tools" / "record_launches.cpp", *objects, f"-L{libraries}", "-ltorch_cpu", "-lc10"]
        subprocess.run(list(map(str, command)), check=True)
        self._own = torch.library.Library("fastkm_simt", "DEF")
        for operator in OPERATORS:
            self._own.define(str(getattr(torch.ops.fastkm, operator).default._schema).removeprefix("fastkm::"))
        torch.ops.load_library(str(made))
        self._library = ctypes.CDLL(str(made))

    def launches(self, operator: str, arguments: tuple, target: str) -> list[Launch]:
        shared, multiprocessors = DEVICES[target]
        self._library.simulate_device(ctypes.c_int64(shared), multiprocessors)
        getattr(torch.ops.fastkm_simt, operator)(*arguments)
        fields, found = [ctypes.c_int64() for _ in range(3)], []
        self._library.next_launch.restype = ctypes.c_bool
        while self._library.next_launch(*map(ctypes.byref, fields)):
            found.append(Launch(*(field.value for field in fields)))
        return found


def cuda_rows(recorder: Recorder) -> Iterator[tuple[str, ...]]:
    shared = {
        (target, kernel_of(operator)): max(
            launch.shared
            for launch in recorder.launches(operator, inputs(operator, PRESET, BATCH, QUERIES, TF32, "cpu"), target)
        )
        for target in DEVICES
        for operator in OPERATORS
    }
    for target in cuda_code.TARGETS:
        for code in cuda_code.kernels(target):
            most = shared[target, code.kernel.partition("<")[0]]
            busy = cuda_code.occupancy(target, code.registers, cuda_code.THREADS, most)
            counts = map(str, (code.registers, round(most / 1024), code.spills))
            yield (f"`{code.kernel}`", "CUDA", target, *counts, f"{busy:.0%}", *map(str, code[3:]))


# ---- Triton --------------------------------------------------------------------------------------------------------


def triton_rows() -> Iterator[tuple[str, ...]]:
    import fastkm.matrix_normal.triton
    import fastkm.posterior.triton
    import fastkm.reading.triton
    import fastkm.writing.triton  # noqa: F401  all four register their operators
    from gpu import aot

    seen = set()
    for target in aot.TARGETS:
        for operator in OPERATORS:
            arguments = inputs(operator, PRESET, BATCH, QUERIES, TF32, "cpu")
            call = getattr(torch.ops.fastkm_triton, operator)
            for launch in aot.record(lambda call=call, arguments=arguments: call(*arguments), target):
                print(f"{target} {operator}: {launch.name}", flush=True)
                code = aot.build(launch, target)
                busy = f"{code.occupancy:.0%}" if code.occupancy else "–"
                counts = map(str, (code.registers, round(code.shared / 1024), code.spills))
                row = (f"`{launch.name}`", "Triton", target, *counts, busy)
                row += tuple(map(str, (code.tensor_cores, code.wide_loads, code.float_atomics)))
                if row not in seen:
                    yield row
                seen.add(row)


# ---- the page ------------------------------------------------------------------------------------------------------

HEADERS = (
    *("kernel", "backend", "target", "registers", "shared KiB", "spills", "occupancy"),
    *("tensor-core", "128-bit loads", "float atomics"),
)
LAUNCH_HEADERS = ("operator", *PRESETS)


def launch_rows(recorder: Recorder) -> Iterator[tuple[str, ...]]:
    """Blocks of each launch of a call with one memory / with many, and what a block of the latter has on chip."""

    def cell(operator: str, preset: Preset) -> str:
        one, many = (
            recorder.launches(operator, inputs(operator, preset, batch, QUERIES, 0, "cpu"), "sm_90")
            for batch in (1, BATCH)
        )
        blocks = (" + ".join(str(launch.blocks) for launch in launches) for launches in (one, many))
        return f"{' / '.join(blocks)}, {' + '.join(str(round(launch.shared / 1024)) for launch in many)} KiB"

    for operator in OPERATORS:
        yield (f"`{operator}`", *(cell(operator, preset) for preset in PRESETS.values()))


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    if reason := cuda_code.unavailable():
        raise SystemExit(f"make kernels: {reason}")
    recorder = Recorder()
    launches = markdown_table(LAUNCH_HEADERS, list(launch_rows(recorder)))
    rows = list(chain(cuda_rows(recorder), triton_rows()))
    update(PAGE, kernels=markdown_table(HEADERS, rows), launches=launches)
    spilling = sorted({f"{row[0]} {row[1]} {row[2]}" for row in rows if row[5] != "0"})
    print(f"{len(rows)} rows into {PAGE.relative_to(ROOT)}. Spill: {', '.join(spilling) or 'none'}")


if __name__ == "__main__":
    main()
