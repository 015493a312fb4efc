"""Fill the tables of docs/results/kernels.md: what the machine code of every GPU kernel shows. Run by `make kernels`.

Nothing is launched. The machine code of the CUDA kernels is read from the built extension. Their launchers run against
``record_launches.cpp``, which records launches. The Triton kernels are compiled for each target as their launchers
would launch them.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import cuda_code  # noqa: E402
from simt import build as simt_build  # noqa: E402
from update_readme import update  # noqa: E402

from fastkm.cli.console import markdown_table  # noqa: E402
from fastkm.testing.operations import CUDA_OPERATORS, GPU_OPERATORS  # noqa: E402
from fastkm.testing.presets import PRESETS, Preset  # noqa: E402
from fastkm.testing.roofline import bytes_to_move, inputs  # noqa: E402

PAGE = ROOT / "docs" / "results" / "kernels.md"
PRESET, BATCH, QUERIES = PRESETS["L"], 64, 32  # shared memory and occupancy are those of this preset
TF32 = 2
# The most shared memory of a thread block, and multiprocessors: A100, H100, B200.
DEVICES = {"sm_80": (163 * 1024, 108), "sm_90": (227 * 1024, 132), "sm_100": (227 * 1024, 148)}
# operator -> the kernel it launches, where the names differ
KERNELS = {
    "update_posterior": "update_kernel",
    "update_posterior_backward": "update_backward_kernel",
    "remove_patterns": "remove_kernel",
    "remove_patterns_backward": "remove_backward_kernel",
    "filter_posterior": "filter_kernel",
    "filter_posterior_backward": "filter_backward_kernel",
    "solve_addressing": "read_kernel",
    "factor_addressing": "read_kernel",
    "solve_factored": "read_factored_kernel",
    "read_factored_backward": "read_backward_kernel",
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


class HostBuild:
    """The CUDA kernels built for the host with one source of this folder, bound as ``torch.ops.fastkm_simt``."""

    def __init__(self, source: str) -> None:
        folder = simt_build.build().parent
        bindings, runtime = sorted(folder.glob("csrc/bindings/*.o")), [folder / "tests/simt/simt.o"]
        if source == "record_launches.cpp":  # is the runtime itself
            kernels, runtime = sorted(folder.glob("csrc/cuda/**/*.o")), []
        else:
            sources = [ROOT / "tests/simt/races.cpp", *sorted((ROOT / "csrc").glob("cuda/**/*.cu"))]
            kernels = sorted(simt_build.build("thread", "program", sources).parent.glob("csrc/cuda/**/*.o"))
        made, libraries = folder / Path(source).with_suffix(".so"), Path(torch.__file__).with_name("lib")
        command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-o", made]
        command += [ROOT / "tools" / source, *kernels, *bindings, *runtime, f"-L{libraries}", "-ltorch_cpu", "-lc10"]
        subprocess.run(list(map(str, command)), check=True)
        self._operators = torch.library.Library("fastkm_simt", "DEF")
        for operator in CUDA_OPERATORS:
            self._operators.define(str(getattr(torch.ops.fastkm, operator).default._schema).removeprefix("fastkm::"))
        torch.ops.load_library(str(made))
        self.library = ctypes.CDLL(str(made))

    def call(self, operator: str, arguments: tuple) -> tuple[Tensor, ...]:
        results = getattr(torch.ops.fastkm_simt, operator)(*arguments)
        return results if isinstance(results, tuple) else (results,)


class Recorder(HostBuild):
    """Records what the launchers would launch. No tensor is read or written."""

    def __init__(self) -> None:
        super().__init__("record_launches.cpp")

    def launches(self, operator: str, arguments: tuple, target: str) -> list[Launch]:
        shared, multiprocessors = DEVICES[target]
        self.library.simulate_device(ctypes.c_int64(shared), multiprocessors)
        self.call(operator, arguments)
        fields, found = [ctypes.c_int64() for _ in range(3)], []
        self.library.next_launch.restype = ctypes.c_bool
        while self.library.next_launch(*map(ctypes.byref, fields)):
            found.append(Launch(*(field.value for field in fields)))
        return found


def example(operator: str, preset: Preset, batch: int) -> tuple:
    """Arguments of an operator with values it can compute with."""
    arguments = inputs(operator, preset, batch, QUERIES, 0, "cpu")
    for x in {id(x): x for x in arguments if isinstance(x, Tensor)}.values():
        if x.dim() == 3 and x.shape[1] == x.shape[2] == preset.K:
            x.copy_(torch.eye(preset.K).expand_as(x))  # a covariance, or a factor
        else:
            x.fill_(1) if x.dim() < 3 else x.normal_(0, 0.3)
    return arguments


class Traffic(NamedTuple):
    """Bytes of arguments and results that a call loads and stores. What is loaded twice counts twice."""

    least: int
    read: int
    written: int
    read_again: int  # of the results


class Counter(HostBuild):
    """Runs the kernels on the host and counts their accesses."""

    def __init__(self) -> None:
        os.environ.setdefault("FASTKM_SIMT_SMS", str(DEVICES["sm_90"][1]))
        super().__init__("count_bytes.cpp")

    def traffic(self, operator: str, preset: Preset, batch: int) -> Traffic:
        arguments = example(operator, preset, batch)
        given = {id(x): x for x in arguments if isinstance(x, Tensor)}.values()
        self.library.count_from_zero()
        results = self.call(operator, arguments)
        read = sum(self._within(x)[0] for x in given)
        read_again, written = (sum(counts) for counts in zip(*map(self._within, results), strict=True))
        return Traffic(bytes_to_move(operator, inputs(operator, preset, batch, QUERIES)), read, written, read_again)

    def _within(self, x: Tensor) -> tuple[int, int]:
        read, written = ctypes.c_int64(), ctypes.c_int64()
        size = ctypes.c_int64(x.numel() * x.element_size())
        self.library.bytes_within(ctypes.c_void_p(x.data_ptr()), size, ctypes.byref(read), ctypes.byref(written))
        return read.value, written.value


TRITON_TRAFFIC_HEADERS = ("Triton: inputs read", "results written", "results read", "× least")
TRAFFIC_HEADERS = ("operator", "preset", "least", "inputs read", "results written", "results read", "× least")


def traffic_rows(counter: Counter, preset: Preset, batch: int) -> list[tuple[str, ...]]:
    """Per memory, in KiB."""
    rows = []
    for operator in CUDA_OPERATORS:
        least, *moved = counter.traffic(operator, preset, batch)
        kib = (f"{count / batch / 1024:,.1f}" for count in (least, *moved))
        rows.append((f"`{operator}`", preset.name, *kib, f"{sum(moved) / least:.2f}"))
    return rows


def cuda_rows(recorder: Recorder) -> Iterator[tuple[str, ...]]:
    shared: dict[tuple[str, str], int] = {}  # the most that any operator launches a kernel with
    for target in DEVICES:
        for operator in CUDA_OPERATORS:
            launches = recorder.launches(operator, inputs(operator, PRESET, BATCH, QUERIES, TF32, "cpu"), target)
            key = (target, kernel_of(operator))
            shared[key] = max(shared.get(key, 0), *(launch.shared for launch in launches), 0)
    for target in cuda_code.TARGETS:
        for code in cuda_code.kernels(target):
            most = shared[target, code.kernel.partition("<")[0]]
            busy = cuda_code.occupancy(target, code.registers, cuda_code.THREADS, most)
            counts = map(str, (code.registers, round(most / 1024), code.spills))
            seen = (code.tensor_cores, code.wide_loads, code.float_atomics)
            yield (f"`{code.kernel}`", "CUDA", target, "all", *counts, f"{busy:.0%}", *map(str, seen))


# ---- Triton --------------------------------------------------------------------------------------------------------


def triton_rows() -> Iterator[tuple[str, ...]]:
    from gpu.launches import all_rows

    for row in all_rows():
        code, use = row.built, f"{row.operator}, {row.preset}, {row.precision}"
        busy = f"{code.occupancy:.0%}" if code.occupancy else "–"
        resources = map(str, (code.registers, round(code.shared / 1024), code.spills))
        counts = map(str, (code.tensor_cores, code.wide_loads, code.float_atomics))
        yield f"`{row.kernel}`", "Triton", row.target, use, *resources, busy, *counts


def triton_traffic_rows(presets: Iterable[Preset], batch: int) -> list[tuple[str, ...]]:
    """The rest of ``traffic_rows``: the same counts for the Triton kernels, in Triton's interpreter."""
    import gpu.launches  # noqa: F401  registers the operators
    from gpu.traffic import Counter as TritonCounter

    counter, rows = TritonCounter(), []
    for preset, operator in product(presets, GPU_OPERATORS):
        arguments = example(operator, preset, batch)
        given = {id(x): x for x in arguments if isinstance(x, Tensor)}.values()
        call = getattr(torch.ops.fastkm_triton, operator)
        moved = counter.of(lambda call=call, arguments=arguments: call(*arguments), given)
        kib = (f"{count / batch / 1024:,.1f}" for count in moved)
        times = sum(moved) / bytes_to_move(operator, inputs(operator, preset, batch, QUERIES))
        rows.append((f"`{operator}`", preset.name, *kib, f"{times:.2f}"))
    return rows


# ---- the page ------------------------------------------------------------------------------------------------------

HEADERS = (
    *("kernel", "backend", "target", "built for", "registers", "shared KiB", "spills", "occupancy"),
    *("tensor-core", "128-bit loads", "float atomics"),
)
LAUNCH_HEADERS = ("operator", *PRESETS)


def launch_rows(recorder: Recorder) -> Iterator[tuple[str, ...]]:
    """Thread blocks of each launch with one memory / with many, and the shared memory of a block of the latter."""

    def cell(operator: str, preset: Preset) -> str:
        one, many = (
            recorder.launches(operator, inputs(operator, preset, batch, QUERIES, 0, "cpu"), "sm_90")
            for batch in (1, BATCH)
        )
        blocks = (" + ".join(str(launch.blocks) for launch in launches) for launches in (one, many))
        return f"{' / '.join(blocks)}, {' + '.join(str(round(launch.shared / 1024)) for launch in many)} KiB"

    for operator in CUDA_OPERATORS:
        yield (f"`{operator}`", *(cell(operator, preset) for preset in PRESETS.values()))


def kept_rows(table: str) -> list[tuple[str, ...]]:
    """The rows of a table as the page holds it."""
    text = PAGE.read_text(encoding="utf-8").split(f"<!-- {table} -->")[1].partition(f"<!-- /{table} -->")[0]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in text.strip().splitlines()[2:]]


def counted_in_a_process(*arguments: str, **environment: str) -> list[list[str]]:
    """Rows of traffic. The counters register the same operators as the recorder, so each has a process of its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    return json.loads(done.stdout)


def fill_page(only_cuda: bool) -> None:
    if reason := cuda_code.unavailable():
        raise SystemExit(f"make kernels: {reason}")
    counted = counted_in_a_process("traffic", "S", "M", "L")
    own = len(TRAFFIC_HEADERS)
    if only_cuda:
        beside = {row[:2]: row[own:] for row in kept_rows("traffic")}
        triton = [row for row in kept_rows("kernels") if row[1] == "Triton"]
    else:
        beside = {tuple(row[:2]): row[2:] for row in counted_in_a_process("triton-traffic", TRITON_INTERPRET="1")}
        triton = list(triton_rows())
    counted = [(*row, *beside.pop(tuple(row[:2]), ["–"] * len(TRITON_TRAFFIC_HEADERS))) for row in counted]
    counted += [(*key, *["–"] * (own - len(key)), *row) for key, row in beside.items()]  # no CUDA kernel
    recorder = Recorder()
    launches = markdown_table(LAUNCH_HEADERS, list(launch_rows(recorder)))
    rows = list(chain(cuda_rows(recorder), triton))
    traffic = markdown_table((*TRAFFIC_HEADERS, *TRITON_TRAFFIC_HEADERS), counted)
    update(PAGE, kernels=markdown_table(HEADERS, rows), launches=launches, traffic=traffic)
    spilling = sorted({f"{row[0]} {row[1]} {row[2]}" for row in rows if row[6] != "0"})
    print(f"{len(rows)} rows into {PAGE.relative_to(ROOT)}. Spill: {', '.join(spilling) or 'none'}")


def main() -> None:
    """Without arguments the whole page; ``cuda`` keeps the rows of Triton; the rest is called by ``fill_page``."""
    task, *presets = sys.argv[1:] or ["page"]
    if task == "triton-traffic":
        print(json.dumps(triton_traffic_rows([PRESETS["S"]], 1)))  # a larger one takes the interpreter minutes a call
        return
    os.environ.pop("TRITON_INTERPRET", None)
    if task == "traffic":
        counter = Counter()
        print(json.dumps([row for name in presets for row in traffic_rows(counter, PRESETS[name], 2)]))
    else:
        fill_page(only_cuda=task == "cuda")


if __name__ == "__main__":
    main()
