"""Vectors that are spread over the threads of a program, and products with them.

A vector in registers is padded to a power of two. The rows of a matrix product with it lie with other threads than the
vector itself, so the result passes through a buffer in the workspace.
"""

import triton
import triton.language as tl

from fastkm._linalg.triton.tiles import BLOCK, load_tile, store_tile, transposed


@triton.jit
def load_vector(x, o, other=0.0):
    """Entries ``o`` of a vector, ``other`` outside it."""
    return tl.load(x.p + o.to(tl.int64) * x.s, mask=o < x.size, other=other)


@triton.jit
def store_vector(to, x, o):
    tl.store(to.p + o.to(tl.int64) * to.s, x, mask=o < to.size)


@triton.jit
def variance_divergence(ratio, excess):
    """r − 1 − ln r ≥ 0 in float32, given r − 1 with its digits: see ``variance_divergence`` of the reference."""
    u = -excess / (1 + ratio)
    square = u * u
    series = 1 / 9 + square * (1 / 11 + square * (1 / 13 + square * (1 / 15)))
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * series))
    near = 2 * square * (1 / (1 + u) + u * series)
    return tl.where((ratio >= 0.5) & (ratio <= 2.0), near, excess - tl.log(ratio))


@triton.jit
def load_cotangent(x, o):
    """Entries ``o`` of the cotangent of an output; () stands for zero."""
    if len(x) == 0:
        return tl.zeros(o.shape, tl.float32)
    else:
        return load_vector(x, o)


@triton.jit
def load_entry(x, i):
    return tl.load(x.p + tl.cast(i, tl.int64) * x.s)


@triton.jit
def share_vector(to, x, o):
    """Store a vector that other threads will read."""
    tl.debug_barrier()
    store_vector(to, x, o)
    tl.debug_barrier()


@triton.constexpr_function
def rows_at_once(size):
    """Rows of a matrix that are multiplied with a vector of ``size`` numbers at once."""
    return max(1, min(16, 2048 // size))


@triton.jit
def product_with_vector(buffer, a, x):
    """A x for a square matrix A and a vector in registers."""
    ROWS: tl.constexpr = rows_at_once(x.shape[0])
    o = tl.arange(0, x.shape[0])
    tl.debug_barrier()
    for i in range(0, a.rows, ROWS):
        o_i = i + tl.arange(0, ROWS)
        store_vector(buffer, tl.sum(load_tile(a, o_i, o) * x[None, :], 1), o_i)
    tl.debug_barrier()
    return load_vector(buffer, o)


@triton.jit
def solve_cholesky_vector(buffer, inverse, x):
    """A⁻¹ x with A = L Lᵀ, from L⁻¹."""
    return product_with_vector(buffer, transposed(inverse), product_with_vector(buffer, inverse, x))


@triton.jit
def add_vector_to_diagonal(to, x):
    """to += diag(x). Ends with a barrier."""
    for i in range(0, to.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        at = to.p + o_i.to(tl.int64) * (to.s_row + 1)
        tl.store(at, tl.load(at, mask=o_i < to.rows, other=0.0) + load_vector(x, o_i), mask=o_i < to.rows)
    tl.debug_barrier()


@triton.jit
def add_symmetric_outer(to, scale, x, y):
    """to += scale (x yᵀ + y xᵀ) / 2 for two vectors in memory. Ends with a barrier."""
    for i in range(0, to.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        x_i, y_i = load_vector(x, o_i), load_vector(y, o_i)
        for j in range(0, to.columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            x_j, y_j = load_vector(x, o_j), load_vector(y, o_j)
            tile = load_tile(to, o_i, o_j)
            tile += (0.5 * scale) * (x_i[:, None] * y_j[None, :] + y_i[:, None] * x_j[None, :])
            store_tile(to, tile, o_i, o_j)
    tl.debug_barrier()
