"""Cholesky factors and inverses of triangles: of a tile in registers, and of a matrix in a workspace block by block."""

import torch
import triton
import triton.language as tl

from fastkm._linalg.triton.product import product_tile
from fastkm._linalg.triton.tiles import (
    BLOCK,
    Matrix,
    diagonal,
    load_tile,
    lower_triangle,
    pick,
    store_tile,
    transposed,
)
from fastkm._runtime.status import ASYMMETRIC, LOST, NOT_POSITIVE_DEFINITE, NOT_WRITTEN, UNTOLD

IS_ASYMMETRIC = tl.constexpr(ASYMMETRIC)
IS_INDEFINITE = tl.constexpr(NOT_POSITIVE_DEFINITE)
IS_LOST = tl.constexpr(LOST)
IS_NOT_WRITTEN = tl.constexpr(NOT_WRITTEN)
IS_UNTOLD = tl.constexpr(UNTOLD)
EPS = tl.constexpr(torch.finfo(torch.float32).eps)
LEAST_DIGITS = tl.constexpr(16.0)
SQRT_EPS = tl.constexpr(torch.finfo(torch.float32).eps ** 0.5)
# What a removal divides by has at least 256 times the rounding of its sum.
LEAST_LEFT = tl.constexpr(256 * torch.finfo(torch.float32).eps)
SQRT_LEAST_LEFT = tl.constexpr((256 * torch.finfo(torch.float32).eps) ** 0.5)

# -------------------------------------------------------------------------------------------------------- in registers


@triton.jit
def eliminate(tile, n, added, slack, ADDED: tl.constexpr):
    """Eliminate the first ``n`` rows of a symmetric tile A = W⁻¹ D W⁻ᵀ in place; rows from ``n`` on become identity.

    Afterwards D stands on the diagonal, the unit lower triangular W = D^½ L⁻¹ below it, and D^½ Lᵀ above it: one
    tile holds the Cholesky factor and its inverse. With ADDED a positive diagonal is added to A, each entry when its
    pivot is taken, so that the rest, which A leaves of the pivot, keeps its digits. A rest below zero by no more than
    ``slack`` is zero. Returns the tile, whether every pivot was that of a positive definite matrix, and the rests.
    """
    o = tl.arange(0, tile.shape[0])
    rests = tl.zeros((tile.shape[0],), tl.float32)
    tile = tl.where((o >= n)[:, None] & (o[:, None] == o[None, :]), 1.0, tile)
    good = n >= 0
    for j in range(n):
        m_j = o == j
        row = tl.sum(tl.where(m_j[:, None], tile, 0.0), 0)
        pivot = tl.sum(tl.where(m_j, row, 0.0), 0)
        if ADDED:
            holds = (pivot >= -pick(slack, o, j)) & (pivot < float("inf"))
            pivot = tl.where(holds & (pivot > 0), pivot, 0.0)
            rests = tl.where(m_j, pivot, rests)
            pivot += pick(added, o, j)
        else:
            holds = (pivot > 0) & (pivot < float("inf"))
            pivot = tl.where(holds, pivot, 1.0)
        good = good & holds
        multiplier = tl.where(o > j, row / pivot, 0.0)
        row = tl.where(m_j, 1.0, row)  # of W: its diagonal is 1
        m_column = (o > j)[:, None] & m_j[None, :]
        tile = tl.where(m_column, 0.0, tile) - multiplier[:, None] * row[None, :]
        tile = tl.where(m_j[:, None] & m_j[None, :], pivot, tile)
    return tile, good, rests


@triton.jit
def holds_variance(variances, explained, noise, pivot):
    """Whether float32 holds wᵀUw after the pattern; ``variances`` is Σ_k w_k² U_kk. See the reference's status."""
    return explained * (noise / pivot) >= variances * LEAST_DIGITS * EPS


@triton.jit
def inverse_of_factor(tile, pivots, o):
    """L⁻¹ from an eliminated tile."""
    unit = tl.where(o[:, None] == o[None, :], 1.0, tl.where(o[:, None] > o[None, :], tile, 0.0))
    return unit / tl.sqrt(pivots)[:, None]


@triton.jit
def factor_transposed(tile, pivots, o):
    """Lᵀ from an eliminated tile."""
    return tl.where(o[:, None] <= o[None, :], tile, 0.0) / tl.sqrt(pivots)[:, None]


@triton.jit
def invert_lower(tile, n):
    """Inverse of a lower triangular tile, row by row in place; rows from ``n`` on become identity."""
    o = tl.arange(0, tile.shape[0])
    tile = tl.where((o >= n)[:, None] & (o[:, None] == o[None, :]), 1.0, tile)
    for j in range(n):
        m_row, m_column, m_below = (o == j)[:, None], (o == j)[None, :], (o > j)[:, None]
        row = tl.sum(tl.where(m_row, tile, 0.0), 0)
        pivot = tl.sum(tl.where(o == j, row, 0.0), 0)
        row = tl.where(o == j, 1.0, tl.where(o < j, row, 0.0)) / pivot
        multiplier = tl.sum(tl.where(m_column & m_below, tile, 0.0), 1)
        tile = tl.where(m_column & m_below, 0.0, tile) - multiplier[:, None] * row[None, :]
        tile = tl.where(m_row, row[None, :], tile)
    return tile


# ------------------------------------------------------------------------------------------------------ in a workspace


@triton.jit
def load_symmetric(to, cov):
    """Copy the lower triangle of a covariance to both triangles. Returns its status. Ends with a barrier."""
    scale, gap = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
    finite = tl.full((), 1, tl.int32)
    for i in range(0, cov.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, i + BLOCK, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            lower, upper = load_tile(cov, o_i, o_j), load_tile(transposed(cov), o_i, o_j)
            scale = tl.maximum(scale, tl.max(tl.maximum(tl.abs(lower), tl.abs(upper))))
            gap = tl.maximum(gap, tl.max(tl.abs(lower - upper)))
            ok = (tl.abs(lower) < float("inf")) & (tl.abs(upper) < float("inf"))
            finite = tl.minimum(finite, tl.min(ok.to(tl.int32)))
            tile = tl.where(lower_triangle(o_i, o_j), lower, upper)
            store_tile(to, tile, o_i, o_j)
            store_tile(transposed(to), tile, o_i, o_j)
    tl.debug_barrier()
    return tl.where(finite == 0, IS_INDEFINITE, tl.where(gap > scale * SQRT_EPS, IS_ASYMMETRIC, 0))


@triton.jit
def mirror_lower(to, x):
    """Copy the lower triangle of a matrix to both triangles of another. Ends with a barrier."""
    for i in range(0, x.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, x.columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            lower, upper = load_tile(x, o_i, o_j), load_tile(transposed(x), o_i, o_j)
            store_tile(to, tl.where(lower_triangle(o_i, o_j), lower, upper), o_i, o_j)
    tl.debug_barrier()


@triton.jit
def factor(a, inverse, SINGLE: tl.constexpr):
    """Cholesky factor of A [n, n] and its inverse, block row by block row. SINGLE: A is no larger than one block.

    A has both triangles. Afterwards A holds Lᵀ on and above its diagonal blocks, and ``inverse`` L⁻¹ with zeros above
    them. Both have the same strides. Returns ln|A| and whether A is positive definite. Ends with a barrier.
    """
    n = a.rows
    o = tl.arange(0, BLOCK)
    log_det, good = tl.full((), 0, tl.float32), n >= 0
    for j in range(0, n, BLOCK):
        o_j = j + o
        tile, holds, _ = eliminate(load_tile(a, o_j, o_j), tl.minimum(n - j, BLOCK), 0.0, 0.0, False)
        good = good & holds
        pivots = diagonal(tile, o)
        log_det += tl.sum(tl.where(o_j < n, tl.log(pivots), 0.0), 0)
        inverse_block = inverse_of_factor(tile, pivots, o)
        tl.debug_barrier()
        store_tile(inverse, inverse_block, o_j, o_j)
        store_tile(a, factor_transposed(tile, pivots, o), o_j, o_j)
        if not SINGLE:
            end = tl.minimum(j + BLOCK, n)
            tl.debug_barrier()
            finish_block_row(a, inverse, j, end)
            update_rows_below(a, inverse, j, end)
    tl.debug_barrier()
    return log_det, good


@triton.jit
def finish_block_row(a, inverse, j, end):
    """Block row ``j`` of L⁻¹ left of its diagonal block, and of Lᵀ right of it. Ends with a barrier."""
    o = tl.arange(0, BLOCK)
    o_j = j + o
    for k in range(0, a.rows, BLOCK):
        if k != j:
            o_k = k + o
            p = inverse.p if k < j else a.p
            x = Matrix(p, a.rows, a.columns, a.s_row, a.s_col)
            solved = product_tile(inverse, x, o_j, o_k, j, end)
            tl.debug_barrier()
            store_tile(x, solved, o_j, o_k)
            if k > j:
                store_tile(inverse, tl.zeros((BLOCK, BLOCK), tl.float32), o_j, o_k)
    tl.debug_barrier()


@triton.jit
def update_rows_below(a, inverse, j, end):
    """Eliminate block row ``j`` from the rows below it, of A and of what becomes L⁻¹. Ends with a barrier."""
    o = tl.arange(0, BLOCK)
    for i in range(j + BLOCK, a.rows, BLOCK):
        o_i = i + o
        for k in range(0, a.rows, BLOCK):
            o_k = k + o
            p = inverse.p if k <= j else a.p
            # Column block j of L⁻¹ holds nothing yet.
            before = load_tile(Matrix(p, tl.where(k == j, 0, a.rows), a.columns, a.s_row, a.s_col), o_i, o_k)
            x = Matrix(p, a.rows, a.columns, a.s_row, a.s_col)
            store_tile(x, before - product_tile(transposed(a), x, o_i, o_k, j, end), o_i, o_k)
    tl.debug_barrier()
