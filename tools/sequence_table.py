"""Fill the table of sequences in docs/results/kernels.md: what a filter's kernels do at sizes of models.

Run by `make kernels`. Nothing is launched on a device. Bytes are counted on one memory and on few chunks, in Triton's
interpreter and, for CUDA, on the host; what a further chunk asks for is the same, so that longer sequences follow. The
launches of CUDA are those that its launchers ask of an H100.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from gpu.traffic import Counter  # noqa: E402
from kernel_table import PAGE, Recorder, example  # noqa: E402
from kernel_table import Counter as CudaCounter  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from update_readme import update  # noqa: E402

from fastkm._linalg.triton.launch import evaluate_layout  # noqa: E402
from fastkm.cli.console import markdown_table  # noqa: E402
from fastkm.filtering.triton.backward import memories_of  # noqa: E402
from fastkm.filtering.triton.chunk import chunk_layout  # noqa: E402
from fastkm.filtering.triton.chunk_backward import filter_backward_layout  # noqa: E402
from fastkm.filtering.triton.forward import chunk_of  # noqa: E402
from fastkm.testing.presets import Preset  # noqa: E402
from fastkm.testing.roofline import bound, inputs  # noqa: E402


class Sequences(NamedTuple):
    batch: int
    T: int
    heads: int
    K: int
    V: int

    @property
    def memories(self) -> int:
        return self.batch * self.heads

    def preset(self, T: int) -> Preset:
        return Preset(f"{T} steps", self.K, self.V, T)


SHAPES = (
    Sequences(1, 1024, 4, 64, 64),
    Sequences(2, 2048, 4, 64, 64),
    Sequences(1, 4096, 4, 64, 64),
    Sequences(4, 2048, 16, 128, 128),
)
OPERATORS = ("filter_posterior", "filter_posterior_backward")
CASES = [(operator, shape) for operator in OPERATORS for shape in SHAPES]
CUDA_CHUNK = 16  # kChunk of csrc/cuda/posterior/chunk.cuh
HEADERS = (
    *("operator", "[B, T, H, K, V]", "backend", "launches", "thread blocks", "workspace MiB", "least MB"),
    *("asked for, × least", "Mflop codes", "Mflop other", "bound µs ieee", "by", "bound µs tf32", "by"),
)


class Found(NamedTuple):
    """What a backend does for one of the CASES."""

    launches: int
    blocks: int
    workspace: int  # bytes of all thread blocks
    asked: int  # bytes of arguments and results, by all thread blocks


def bytes_of_all(shape: Sequences, chunk: int, counted: Callable[[int], int]) -> int:
    """Of a sequence, from what is counted on one memory and few chunks."""
    few, more = counted(2 * chunk), counted(3 * chunk)
    return shape.memories * (few + (more - few) * (shape.T // chunk - 2))


# ---- Triton --------------------------------------------------------------------------------------------------------


def triton_workspace(operator: str, shape: Sequences) -> int:
    chunk = chunk_of(shape.T)
    if operator == "filter_posterior":
        numbers = evaluate_layout(chunk_layout, shape.K, shape.V, chunk).end
    else:
        memories = memories_of(shape.T, chunk, False)
        numbers = evaluate_layout(filter_backward_layout, shape.K, shape.V, memories, chunk).end
    return 4 * int(getattr(numbers, "value", numbers)) * shape.memories


def triton_found() -> Iterator[Found]:
    counter = Counter()
    for operator, shape in CASES:

        def counted(T: int, operator=operator, shape=shape) -> int:
            arguments = example(operator, shape.preset(T), 1)
            given = {id(x): x for x in arguments if isinstance(x, torch.Tensor)}.values()
            return sum(counter.of(lambda: getattr(torch.ops.fastkm_triton, operator)(*arguments), given))

        asked = bytes_of_all(shape, chunk_of(shape.T), counted)
        yield Found(1, shape.memories, triton_workspace(operator, shape), asked)


# ---- CUDA ----------------------------------------------------------------------------------------------------------


def cuda_launches() -> Iterator[tuple[int, int, int]]:
    """The launches of each case, their thread blocks, and the bytes that are allocated beside the results."""
    recorder = Recorder()
    for operator, shape in CASES:
        arguments = inputs(operator, shape.preset(shape.T), shape.memories, 0, 0, "cpu")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            launches = recorder.launches(operator, arguments, "sm_90")
        events = recorded.profiler.kineto_results.events()
        allocated = sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")
        results = sum(x.nbytes for x in recorder.call(operator, arguments))
        recorder.launches(operator, arguments, "sm_90")  # forgets those of the call
        yield len(launches), sum(launch.blocks for launch in launches), allocated - results


def cuda_bytes() -> Iterator[int]:
    counter = CudaCounter()
    for operator, shape in CASES:
        yield bytes_of_all(
            shape,
            CUDA_CHUNK,
            lambda T, operator=operator, shape=shape: sum(counter.traffic(operator, shape.preset(T), 1)[1:]),
        )


TASKS = {"cuda-launches": cuda_launches, "cuda-bytes": cuda_bytes}


def in_a_process(task: str) -> list:
    """Both register the same operators, so each has a process of its own."""
    done = subprocess.run([sys.executable, __file__, task], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def cuda_found() -> Iterator[Found]:
    for launches, asked in zip(in_a_process("cuda-launches"), in_a_process("cuda-bytes"), strict=True):
        yield Found(*launches, asked)


# ---- the page ------------------------------------------------------------------------------------------------------


def rows() -> Iterator[tuple[str, ...]]:
    for (operator, shape), *found in zip(CASES, cuda_found(), triton_found(), strict=True):
        ieee, tf32 = (bound(operator, shape.preset(shape.T), shape.memories, 0, x) for x in ("ieee", "tf32"))
        for backend, of in zip(("CUDA", "Triton"), found, strict=True):
            yield (
                *(f"`{operator}`", str(list(shape)), backend, str(of.launches), str(of.blocks)),
                *(f"{of.workspace / 2**20:,.1f}", f"{ieee.bytes / 1e6:,.1f}", f"{of.asked / ieee.bytes:.1f}"),
                *(f"{ieee.flops.codes / 1e6:,.0f}", f"{ieee.flops.other / 1e6:,.0f}"),
                *(f"{1e6 * ieee.seconds:.1f}", ieee.by, f"{1e6 * tf32.seconds:.1f}", tf32.by),
            )


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(list(TASKS[sys.argv[1]]())))
    else:
        update(PAGE, sequences=markdown_table(HEADERS, list(rows())))
