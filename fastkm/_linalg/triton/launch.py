"""Launching: operators, launch options, workspaces, and tensors as kernel arguments."""

import atexit
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fastkm._linalg.triton.tiles import BLOCK, Matrices, Numbers, Vectors
from fastkm._runtime.options import PRECISIONS
from fastkm._runtime.torch_private import has_kernel

KEY = "CompositeExplicitAutograd"
_implementations = torch.library.Library("fastkm_triton", "IMPL", KEY)
atexit.register(lambda: _implementations)  # kept until the process ends, as the operators are


def implements(name: str) -> Callable[[Callable], Callable]:
    """Make the function below it the implementation of ``fastkm_triton::name`` on every device."""

    def register(launcher: Callable) -> Callable:
        def on_its_device(first: Tensor, *rest):
            with torch.cuda.device_of(first):  # Triton launches on the current device
                return launcher(first, *rest)

        if not has_kernel(f"fastkm_triton::{name}", KEY):  # there already when this module is imported a second time
            _implementations.impl(name, on_its_device)
        return launcher

    return register


# ------------------------------------------------------------------------------------------------------------- options

# Registers a thread may take, by warps a program has. Left to itself the assembler saves registers by spilling a few.
REGISTERS = {1: 128, 4: 168, 8: 240, 16: 128}

# The largest covariance that the registers of one program hold, and the warps for each padded size.
LARGEST_TILE = 128
WARPS = {16: 1, 32: 4, 64: 4, 128: 8}


def warps(number: int, registers: int | None = None) -> dict[str, int]:
    """Options of a launch. Loads are not pipelined: what one program stores it loads again soon after."""
    options = {"num_warps": number, "num_stages": 1}
    return options if torch.version.hip else {**options, "maxnreg": registers or REGISTERS[number]}


def factoring(n: int) -> dict[str, int | bool]:
    """Options of a kernel that factors a matrix [n, n]."""
    return {"SINGLE": n <= BLOCK.value, **warps(4)}


def blocks_of(n: int) -> int:
    """Blocks, or tiles, that cover ``n`` rows."""
    return triton.cdiv(n, BLOCK.value)


def padded(n: int) -> int:
    """The power of two that registers hold ``n`` rows in."""
    return max(16, triton.next_power_of_2(n))


def precision_of(code: int) -> str:
    return PRECISIONS[code]


# ---------------------------------------------------------------------------------------------------------- workspaces


def row_stride(n: int) -> int:
    """Rows of a workspace start at multiples of 64 bytes."""
    return -(-n // 16) * 16


def workspace(like: Tensor, batch: int, layout, *sizes: int) -> Numbers:
    """A workspace for each of ``batch`` programs, as large as ``layout`` says.

    ``layout(p, *sizes)`` is the ``@triton.jit`` function by which the kernel itself finds the parts of its workspace;
    it returns a named tuple whose last field ``end`` is where the workspace ends.
    """
    size = row_stride(_size(layout, *sizes))
    return Numbers(like.new_empty(batch, size), size)


@functools.lru_cache(maxsize=256)
def _size(layout, *sizes: int) -> int:
    end = evaluate_layout(layout, *sizes).end
    return getattr(end, "value", end)  # of a constexpr


def evaluate_layout(layout, *sizes: int) -> Any:
    """The parts of a workspace at address 0."""
    return _as_python(layout)(0, *sizes)


@functools.cache
def _as_python(layout) -> Callable:
    """A ``@triton.jit`` function of integers as Python can call it, with the functions that it calls."""
    code, known = layout.fn.__code__, layout.fn.__globals__
    called = {name: known[name] for name in code.co_names if name in known}
    return types.FunctionType(
        code, {name: _as_python(each) if hasattr(each, "fn") else each for name, each in called.items()}
    )


# --------------------------------------------------------------------------------------------------- kernel arguments


def matrices(x: Tensor | None) -> Matrices | None:
    """A tensor [B, rows, columns] as a kernel argument."""
    return None if x is None else Matrices(x, *x.stride())


def vectors(x: Tensor | None) -> Vectors | None:
    """A tensor [B, size] as a kernel argument."""
    return None if x is None else Vectors(x, *x.stride())


def numbers(x: Tensor) -> Numbers:
    """A tensor [B] as a kernel argument."""
    return Numbers(x, *x.stride())


def mask_vectors(mask: Tensor | None) -> Vectors | None:
    return None if mask is None else vectors(mask.view(torch.uint8))


def rows_aligned(*tensors: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes and ends at one, so that it can be read 128 bits at a time."""
    return all(
        x.shape[-1] % 4 == 0
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(s % 4 == 0 for s in x.stride()[:-1])
        for x in tensors
    )
