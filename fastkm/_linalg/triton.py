"""What the Triton kernels of all families share: tiles, and the dense algebra of one program in its own working memory.

One program computes one memory, or one tile of it. Matrices that do not fit in registers lie in a piece of global
memory that belongs to the program alone; what one thread of it wrote another may read after a ``tl.debug_barrier()``.
Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``s_`` stride. Addresses are 64 bits wide.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkm._runtime.options import PRECISIONS
from fastkm._runtime.status import ASYMMETRIC, NOT_POSITIVE_DEFINITE

_implementations = torch.library.Library("fastkm_triton", "IMPL", "CompositeExplicitAutograd")

IS_ASYMMETRIC = tl.constexpr(ASYMMETRIC)
IS_INDEFINITE = tl.constexpr(NOT_POSITIVE_DEFINITE)
SQRT_EPS = tl.constexpr(torch.finfo(torch.float32).eps ** 0.5)
EPS = tl.constexpr(torch.finfo(torch.float32).eps)


def implements(name: str) -> Callable[[Callable], Callable]:
    """Make the function below it the implementation of ``fastkm_triton::name`` on every device."""

    def register(launcher: Callable) -> Callable:
        def on_its_device(first: Tensor, *rest):
            with torch.cuda.device_of(first):  # Triton launches on the current device
                return launcher(first, *rest)

        _implementations.impl(name, on_its_device)
        return launcher

    return register


# ---------------------------------------------------------------------------------------------------------- launching

# Matrices in working memory are factored and multiplied in tiles of this size: 8 numbers of each a thread, which leaves
# registers for both operands of a product.
BLOCK = 32


# Registers a thread may take, by warps a program has. Left to itself the assembler saves registers by spilling a few.
REGISTERS = {1: 128, 4: 168, 8: 240, 16: 128}


def warps(number: int, registers: int | None = None) -> dict[str, int]:
    """Options of a launch. Loads are not pipelined: what one program stores it loads again soon after."""
    options = {"num_warps": number, "num_stages": 1}
    return options if torch.version.hip else {**options, "maxnreg": registers or REGISTERS[number]}


def square(n: int) -> dict[str, int | bool]:
    """How a program treats matrices of which it factors one [n, n]; what it factors in one piece needs no blocks."""
    return {"BLOCK": BLOCK, "SINGLE": n <= BLOCK, **warps(4)}


def row_stride(n: int) -> int:
    """Rows of working memory start at multiples of 64 bytes."""
    return -(-n // 16) * 16


def workspace(like: Tensor, batch: int, size: int) -> Tensor:
    """Memory of their own for the programs of a launch."""
    return like.new_empty(batch, row_stride(size))


def strides(x: Tensor | None, axes: int) -> tuple[int, ...]:
    """Of a tensor that may be missing."""
    return (0,) * axes if x is None else x.stride()


def precision_of(index: int) -> str:
    return PRECISIONS[index]


def rows_aligned(*matrices: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes and ends at one, so that it can be read 128 bits at a time."""
    return all(
        x.shape[-1] % 4 == 0
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(s % 4 == 0 for s in x.stride()[:-1])
        for x in matrices
    )


# --------------------------------------------------------------------------------------------------------------- tiles


@triton.jit
def fours(x, ALIGNED: tl.constexpr):
    """Tell the compiler that a size or stride is a multiple of four, as ``rows_aligned`` found."""
    if ALIGNED:
        return x // 4 * 4
    else:
        return x


@triton.jit
def load_tile(p, o_row, o_col, n_row, n_col, s_row, s_col):
    """Rows ``o_row`` and columns ``o_col`` of a matrix [n_row, n_col] in float32, zero outside."""
    m = (o_row < n_row)[:, None] & (o_col < n_col)[None, :]
    at = p + o_row.to(tl.int64)[:, None] * s_row + o_col.to(tl.int64)[None, :] * s_col
    return tl.load(at, mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_tile(p, value, o_row, o_col, n_row, n_col, s_row, s_col):
    m = (o_row < n_row)[:, None] & (o_col < n_col)[None, :]
    at = p + o_row.to(tl.int64)[:, None] * s_row + o_col.to(tl.int64)[None, :] * s_col
    tl.store(at, value, mask=m)


@triton.jit
def copy_or_zero(p_to, s_to, p_from, s_row, s_col, rows, columns, GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Copy a matrix that may be missing, which is zero. Ends with a barrier."""
    for i in range(0, rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            b = tl.zeros((BLOCK, BLOCK), tl.float32)
            if GIVEN:
                b = load_tile(p_from, o_i, o_j, rows, columns, s_row, s_col)
            store_tile(p_to, b, o_i, o_j, rows, columns, s_to, 1)
    tl.debug_barrier()


@triton.jit
def pick(vector, o, i):
    """Entry ``i`` of a vector in registers."""
    return tl.sum(tl.where(o == i, vector, 0.0), 0)


@triton.jit
def diagonal(tile, o):
    return tl.sum(tl.where(o[:, None] == o[None, :], tile, 0.0), 1)


# ------------------------------------------------------------------------------------------------- factors in registers


@triton.jit
def eliminate(tile, n, floor, slack, FLOORED: tl.constexpr):
    """Eliminate the first ``n`` rows of a symmetric tile A = W⁻¹ D W⁻ᵀ in place; rows from ``n`` on become identity.

    Afterwards D stands on the diagonal, the unit lower triangular W = D^½ L⁻¹ below it, and D^½ Lᵀ above it: one
    tile holds the Cholesky factor and its inverse. A pivot below its floor by no more than ``slack`` is raised to it.
    Returns the tile and whether every pivot was that of a positive definite matrix.
    """
    SIZE: tl.constexpr = tile.shape[0]
    o = tl.arange(0, SIZE)
    tile = tl.where((o >= n)[:, None] & (o[:, None] == o[None, :]), 1.0, tile)
    good = n >= 0
    for j in range(n):
        m_here = o == j
        row = tl.sum(tl.where(m_here[:, None], tile, 0.0), 0)
        pivot = tl.sum(tl.where(m_here, row, 0.0), 0)
        if FLOORED:
            least = pick(floor, o, j)
            holds = (pivot >= least - pick(slack, o, j)) & (pivot < float("inf"))
            pivot = tl.maximum(pivot, least)
        else:
            holds = (pivot > 0) & (pivot < float("inf"))
        good = good & holds
        pivot = tl.where(holds, pivot, 1.0)
        multiplier = tl.where(o > j, row / pivot, 0.0)
        row = tl.where(m_here, 1.0, row)  # of W, whose column j starts with its unit diagonal
        m_column = (o > j)[:, None] & m_here[None, :]
        tile = tl.where(m_column, 0.0, tile) - multiplier[:, None] * row[None, :]
        tile = tl.where(m_here[:, None] & m_here[None, :], pivot, tile)
    return tile, good


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
    SIZE: tl.constexpr = tile.shape[0]
    o = tl.arange(0, SIZE)
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


# ----------------------------------------------------------------------------------------- algebra in working memory


@triton.jit
def tile_product(
    p_a, s_am, s_ak, p_b, s_bk, s_bn, o_m, o_n, m, n, first, end, PRECISION: tl.constexpr, STEP: tl.constexpr
):
    """One tile of A B, summed over [first, end). STEP is what one thread holds of a row of A and a column of B."""
    total = tl.zeros((o_m.shape[0], o_n.shape[0]), tl.float32)
    for k in range(first, end, STEP):
        o_k = k + tl.arange(0, STEP)
        b_a = load_tile(p_a, o_m, o_k, m, end, s_am, s_ak)
        b_b = load_tile(p_b, o_k, o_n, end, n, s_bk, s_bn)
        total = tl.dot(b_a, b_b, total, input_precision=PRECISION)
    return total


@triton.jit
def product(
    p_out, s_om, s_on, p_a, s_am, s_ak, p_b, s_bk, s_bn, m, n, k, alpha,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out = alpha A B, or out += alpha A B, tile by tile; A [m, k], B [k, n], out [m, n] apart from both."""
    for i_m in range(0, m, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        for i_n in range(0, n, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N)
            total = tile_product(p_a, s_am, s_ak, p_b, s_bk, s_bn, o_m, o_n, m, n, 0, k, PRECISION, STEP) * alpha
            if ADD:
                total += load_tile(p_out, o_m, o_n, m, n, s_om, s_on)
            store_tile(p_out, total, o_m, o_n, m, n, s_om, s_on)
    tl.debug_barrier()


@triton.jit
def load_symmetric(p_to, ld, p_from, s_row, s_col, n, BLOCK: tl.constexpr):
    """Copy the lower triangle of a covariance to both triangles; its status, as in ``guards``."""
    scale, gap = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
    finite = tl.full((), 1, tl.int32)
    for i in range(0, n, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, i + BLOCK, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            here = load_tile(p_from, o_i, o_j, n, n, s_row, s_col)
            mirrored = load_tile(p_from, o_i, o_j, n, n, s_col, s_row)
            scale = tl.maximum(scale, tl.max(tl.maximum(tl.abs(here), tl.abs(mirrored))))
            gap = tl.maximum(gap, tl.max(tl.abs(here - mirrored)))
            ok = (tl.abs(here) < float("inf")) & (tl.abs(mirrored) < float("inf"))
            finite = tl.minimum(finite, tl.min(ok.to(tl.int32)))
            b = tl.where(o_i[:, None] >= o_j[None, :], here, mirrored)
            store_tile(p_to, b, o_i, o_j, n, n, ld, 1)
            store_tile(p_to, b, o_i, o_j, n, n, 1, ld)
    tl.debug_barrier()
    return tl.where(finite == 0, IS_INDEFINITE, tl.where(gap > scale * SQRT_EPS, IS_ASYMMETRIC, 0))


@triton.jit
def fill_both_triangles(p_to, p_from, n, ld, BLOCK: tl.constexpr):
    """Mirror the lower triangle of a matrix [n, n]."""
    for i in range(0, n, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, n, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            here = load_tile(p_from, o_i, o_j, n, n, ld, 1)
            mirrored = load_tile(p_from, o_i, o_j, n, n, 1, ld)
            store_tile(p_to, tl.where(o_i[:, None] >= o_j[None, :], here, mirrored), o_i, o_j, n, n, ld, 1)
    tl.debug_barrier()


@triton.jit
def factor(p_a, p_inverse, n, ld, BLOCK: tl.constexpr, SINGLE: tl.constexpr):
    """Cholesky factor of A [n, n] and its inverse, block row by block row.

    A has both triangles. Afterwards A holds Lᵀ on and above its diagonal blocks, and ``p_inverse`` L⁻¹ with zeros above
    them. Returns ln|A| and whether A is positive definite.
    """
    o = tl.arange(0, BLOCK)
    log_det, good = tl.full((), 0, tl.float32), n >= 0
    for j in range(0, n, BLOCK):
        o_j = j + o
        tile = load_tile(p_a, o_j, o_j, n, n, ld, 1)
        tile, holds = eliminate(tile, tl.minimum(n - j, BLOCK), 0.0, 0.0, False)
        good = good & holds
        pivots = diagonal(tile, o)
        log_det += tl.sum(tl.where(o_j < n, tl.log(pivots), 0.0), 0)
        inverse = inverse_of_factor(tile, pivots, o)
        tl.debug_barrier()
        store_tile(p_inverse, inverse, o_j, o_j, n, n, ld, 1)
        store_tile(p_a, factor_transposed(tile, pivots, o), o_j, o_j, n, n, ld, 1)
        if not SINGLE:
            # This block row of L⁻¹ and of Lᵀ.
            end = tl.minimum(j + BLOCK, n)
            tl.debug_barrier()
            for k in range(0, n, BLOCK):
                if k != j:
                    o_k = k + o
                    p = p_inverse if k < j else p_a
                    y = tile_product(p_inverse, ld, 1, p, ld, 1, o_j, o_k, n, n, j, end, "ieee", 16)
                    tl.debug_barrier()
                    store_tile(p, y, o_j, o_k, n, n, ld, 1)
                    if k > j:
                        store_tile(p_inverse, tl.zeros((BLOCK, BLOCK), tl.float32), o_j, o_k, n, n, ld, 1)
            tl.debug_barrier()
            # What it means for the rows below.
            for i in range(j + BLOCK, n, BLOCK):
                o_i = i + o
                for k in range(0, n, BLOCK):
                    o_k = k + o
                    p = p_inverse if k <= j else p_a
                    before = load_tile(p, o_i, o_k, tl.where(k == j, 0, n), n, ld, 1)
                    taken = tile_product(p_a, 1, ld, p, ld, 1, o_i, o_k, n, n, j, end, "ieee", 16)
                    store_tile(p, before - taken, o_i, o_k, n, n, ld, 1)
            tl.debug_barrier()
    tl.debug_barrier()
    return log_det, good
