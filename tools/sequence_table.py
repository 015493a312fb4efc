"""Fill the table of sequences in docs/results/kernels.md: what a filter's Triton kernels do at sizes of models.

Run by `make kernels`. Nothing is launched on a device. Bytes are counted in Triton's interpreter on one memory and on
few chunks; what a further chunk asks for is the same, so that longer sequences follow.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from gpu.traffic import Counter  # noqa: E402
from kernel_table import PAGE, example  # noqa: E402
from update_readme import update  # noqa: E402

from fastkm._linalg.triton.launch import evaluate_layout  # noqa: E402
from fastkm.cli.console import markdown_table  # noqa: E402
from fastkm.filtering.triton.backward import memories_of  # noqa: E402
from fastkm.filtering.triton.chunk import chunk_layout  # noqa: E402
from fastkm.filtering.triton.chunk_backward import filter_backward_layout  # noqa: E402
from fastkm.filtering.triton.forward import chunk_of  # noqa: E402
from fastkm.testing.presets import Preset  # noqa: E402
from fastkm.testing.roofline import bound  # noqa: E402


class Sequences(NamedTuple):
    batch: int
    T: int
    heads: int
    K: int
    V: int

    @property
    def programs(self) -> int:
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
HEADERS = (
    *("operator", "[B, T, H, K, V]", "launches", "programs", "workspace MiB", "least MB", "asked for, × least"),
    *("Mflop codes", "Mflop other", "bound µs ieee", "by", "bound µs tf32", "by"),
)


def workspace_of(operator: str, shape: Sequences) -> int:
    """Bytes of all programs."""
    chunk = chunk_of(shape.T)
    if operator == "filter_posterior":
        numbers = evaluate_layout(chunk_layout, shape.K, shape.V, chunk).end
    else:
        memories = memories_of(shape.T, chunk, False)
        numbers = evaluate_layout(filter_backward_layout, shape.K, shape.V, memories, chunk).end
    return 4 * int(getattr(numbers, "value", numbers)) * shape.programs


def bytes_asked_for(counter: Counter, operator: str, shape: Sequences) -> int:
    """Of arguments and results, by all programs."""

    def counted(T: int) -> int:
        arguments = example(operator, shape.preset(T), 1)
        given = {id(x): x for x in arguments if isinstance(x, torch.Tensor)}.values()
        return sum(counter.of(lambda: getattr(torch.ops.fastkm_triton, operator)(*arguments), given))

    chunk = chunk_of(shape.T)
    few, more = counted(2 * chunk), counted(3 * chunk)
    return shape.programs * (few + (more - few) * (shape.T // chunk - 2))


def rows(counter: Counter) -> Iterator[tuple[str, ...]]:
    for operator in OPERATORS:
        for shape in SHAPES:
            ieee, tf32 = (bound(operator, shape.preset(shape.T), shape.programs, 0, x) for x in ("ieee", "tf32"))
            asked = bytes_asked_for(counter, operator, shape) / ieee.bytes
            yield (
                *(f"`{operator}`", str(list(shape)), "1", str(shape.programs)),
                *(f"{workspace_of(operator, shape) / 2**20:,.1f}", f"{ieee.bytes / 1e6:,.1f}", f"{asked:.1f}"),
                *(f"{ieee.flops.codes / 1e6:,.0f}", f"{ieee.flops.other / 1e6:,.0f}"),
                *(f"{1e6 * ieee.seconds:.1f}", ieee.by, f"{1e6 * tf32.seconds:.1f}", tf32.by),
            )


if __name__ == "__main__":
    update(PAGE, sequences=markdown_table(HEADERS, list(rows(Counter()))))
