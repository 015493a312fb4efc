"""Kernels with one mistake each; some take a flag that corrects it."""

import triton
import triton.language as tl


@triton.jit
def double(p_in, p_out, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_in + o, mask=o < n, other=0.0)
    if MASKED:
        tl.store(p_out + o, 2 * x, mask=o < n)
    else:
        tl.store(p_out + o, 2 * x)


@triton.jit
def shift(p_in, p_out, n, BLOCK: tl.constexpr):
    """Reads the entry before the first."""
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_in + o - 1, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def total(p_in, p_out, n, BLOCK: tl.constexpr):
    """Sums what a masked load returns where it is masked."""
    o = tl.arange(0, BLOCK)
    tl.store(p_out, tl.sum(tl.load(p_in + o, mask=o < n), 0))


@triton.jit
def last_writer(p_out):
    """Every program writes the same entry."""
    tl.store(p_out, tl.program_id(0).to(tl.float32))


@triton.jit
def multiply(p_a, p_b, p_out, STATED: tl.constexpr, N: tl.constexpr):
    """Without a stated precision a float32 product is a tf32 one."""
    o = tl.arange(0, N)
    at = o[:, None] * N + o[None, :]
    if STATED:
        tl.store(p_out + at, tl.dot(tl.load(p_a + at), tl.load(p_b + at), input_precision="ieee"))
    else:
        tl.store(p_out + at, tl.dot(tl.load(p_a + at), tl.load(p_b + at)))


@triton.jit
def add_in_bfloat16(p_a, p_b, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.load(p_a + o) + tl.load(p_b + o))


@triton.jit
def sum_by_the_last(p_in, p_parts, p_ticket, p_out, n, SEM: tl.constexpr, GUARDED: tl.constexpr, EARLY: tl.constexpr):
    """Every program leaves a part, and the one that draws the last ticket adds them up."""
    i = tl.program_id(0)
    part = 2 * tl.load(p_in + i)
    if not EARLY:
        tl.store(p_parts + i, part)
    tl.debug_barrier()
    ticket = tl.atomic_add(p_ticket, 1, sem=SEM)
    if EARLY:
        tl.store(p_parts + i, part)
    if ticket == n - 1 or not GUARDED:
        total = 0.0
        for j in range(n):
            total += tl.load(p_parts + j)
        tl.store(p_out, total)
