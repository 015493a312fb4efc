"""The time that no kernel can beat on one H100, from bytes and operations alone.

A bound, never a measurement. It counts of every operation only what cannot be left out: each input is read from memory
once, each output is written once, and the operations are the fewest by which we know to compute it. Everything else
that costs time (launches, waiting for one another, a chip that few memories cannot fill) is left out. Operands that an
earlier call left in the L2 cache can come faster than from memory, so only a cold call is compared with it.

Ceilings: NVIDIA H100 Tensor Core GPU datasheet, the SXM form: 3.35 TB/s of memory bandwidth, 67 TFLOP/s in float32, and
989 TFLOP/s in TF32 on tensor cores with sparsity, half of which is dense.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkm._runtime.counts import Flops
from fastkm.testing.operands import empty_operands
from fastkm.testing.operations import OPERATORS
from fastkm.testing.presets import PRESETS, Preset

BANDWIDTH = 3.35e12  # bytes a second
FLOAT32 = 67e12  # operations a second
TENSOR = {"tf32x3": 989e12 / 2 / 3, "tf32": 989e12 / 2}  # three products make one that is nearly float32


class Bound(NamedTuple):
    bytes: int
    flops: Flops
    seconds: float
    by: str  # what takes this long


def inputs(operator: str, preset: Preset, batch: int, queries: int, precision: int = 0, device: str = "meta") -> tuple:
    """Arguments of an operator, tensors not filled: float32, no mask, a cotangent for every output."""
    return OPERATORS[operator].arguments(empty_operands(preset, batch, queries, device, precision=precision))


def bytes_to_move(operator: str, arguments: tuple) -> int:
    """Of every tensor that goes in and, by the operator's own schema, of every one that comes out."""
    outputs = getattr(torch.ops.fastkm, operator)(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(x.numel() * x.element_size() for x in (*arguments, *outputs) if isinstance(x, Tensor))


def bound(operator: str, preset: Preset, batch: int, queries: int, precision: str = "ieee") -> Bound:
    """The least time of one call: that of the unit with most to do while all work at once."""
    moved = bytes_to_move(operator, inputs(operator, preset, batch, queries))
    codes, other = (batch * count for count in OPERATORS[operator].flops(preset.K, preset.C, preset.T, queries))
    times = {"memory": moved / BANDWIDTH}
    if precision == "ieee":
        times["float32"] = (codes + other) / FLOAT32
    else:
        times |= {"float32": other / FLOAT32, "tensor cores": codes / TENSOR[precision]}
    by = max(times, key=times.__getitem__)
    return Bound(moved, Flops(codes, other), times[by], by)


# ---- the table -----------------------------------------------------------------------------------------------------

HEADERS = ("operator", "preset", "MB", "Mflop codes", "Mflop other", "flop/byte", "µs ieee", "bound by", "µs tf32",
           "bound by")  # fmt: skip


def bound_row(operator: str, preset: Preset, batch: int, queries: int) -> tuple[str, ...]:
    ieee, tf32 = (bound(operator, preset, batch, queries, precision) for precision in ("ieee", "tf32"))
    intensity = sum(ieee.flops) / ieee.bytes
    counts = (ieee.bytes / 1e6, ieee.flops.codes / 1e6, ieee.flops.other / 1e6)
    last = (f"{1e6 * tf32.seconds:.2f}", tf32.by) if ieee.flops.codes else ("–", "–")
    numbers = (f"{count:,.1f}" for count in counts)
    return (operator, preset.name, *numbers, f"{intensity:.1f}", f"{1e6 * ieee.seconds:.2f}", ieee.by, *last)


def bound_table(batch: int, queries: int) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, headers, rows."""
    title = (
        f"A BOUND for one H100 SXM, not a measurement: no kernel is faster than this with cold caches. B = {batch}, "
        f"Q = {queries}, float32. {BANDWIDTH / 1e12} TB/s, {FLOAT32 / 1e12:.0f} TFLOP/s float32, "
        f"{TENSOR['tf32'] / 1e12:.0f} TFLOP/s TF32 (dense) by NVIDIA's H100 datasheet."
    )
    return (
        title,
        HEADERS,
        [bound_row(name, preset, batch, queries) for preset in PRESETS.values() for name in OPERATORS],
    )
