"""The ridge system factored by one operator and solved by another, for queries that come one after the other."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkm._linalg.triton.factor import IS_INDEFINITE, invert_lower
from fastkm._linalg.triton.launch import (
    blocks_of,
    factoring,
    implements,
    matrices,
    numbers,
    row_stride,
    rows_aligned,
    warps,
    workspace,
)
from fastkm._linalg.triton.product import product, product_tile
from fastkm._linalg.triton.ridge import factor_layout, factor_system
from fastkm._linalg.triton.tiles import (
    BLOCK,
    Matrix,
    assume_aligned,
    assume_fours,
    end_of,
    load_tile,
    lower_triangle,
    matrix_of,
    number_of,
    place,
    place_after,
    result_of,
    rows_from,
    store_tile,
    transposed,
)


@triton.jit
def factor_kernel(mean, ridge, p_factor, p_status, workspaces, K, C, ld, ALIGNED: tl.constexpr, SINGLE: tl.constexpr):
    """L with L Lᵀ = R Rᵀ + λI. Bytes moved: mean in, factor out, once each."""
    C, mean = assume_fours(C, ALIGNED), assume_aligned(mean, ALIGNED)
    i_b = tl.program_id(0).to(tl.int64)
    system = factor_layout(workspaces.p + i_b * workspaces.s_b, K, ld, False)
    good = factor_system(system, matrix_of(mean, i_b, K, C), number_of(ridge, i_b), False, SINGLE)
    to = result_of(p_factor, i_b, K, K)
    for i in range(0, K, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, K, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            tile = load_tile(transposed(system.lower), o_i, o_j)
            store_tile(to, tl.where(lower_triangle(o_i, o_j), tile, 0.0), o_i, o_j)
    tl.store(p_status + i_b, tl.where(good, 0, IS_INDEFINITE))


class Parts(NamedTuple):
    """The workspace of one tile of queries."""

    solution: Any  # R z of every query, then what it solves to, block column by block column [BLOCK, K]
    rest: Any  # the block column that is being solved [BLOCK, BLOCK]
    inverses: Any  # of the diagonal blocks of L, one below the other [K, BLOCK] and what fills the last
    end: Any


@triton.jit
def solve_factored_layout(p, blocks, K, ld):
    solution = place(p, BLOCK, K, ld)
    rest = place_after(solution, BLOCK, BLOCK, BLOCK)
    inverses = place_after(rest, blocks * BLOCK, BLOCK, BLOCK)
    return Parts(solution, rest, inverses, end_of(inverses))


@triton.jit
def solve_factored_kernel(
    mean, factor, queries, p_weights, workspaces, K, C, Q, ld, tiles, blocks, ALIGNED: tl.constexpr
):
    """One tile of queries:  W = (Z Rᵀ) L⁻ᵀ L⁻¹, block column by block column.

    Bytes moved: queries in and weights out once; mean and factor once a tile of queries, from the second-level cache.
    """
    C, mean, queries = assume_fours(C, ALIGNED), assume_aligned(mean, ALIGNED), assume_aligned(queries, ALIGNED)
    i = tl.program_id(0)
    i_tile, i_b = i % tiles, (i // tiles).to(tl.int64)
    parts = solve_factored_layout(workspaces.p + i.to(tl.int64) * workspaces.s_b, blocks, K, ld)
    first, count = tl.cast(i_tile, tl.int64) * BLOCK, tl.minimum(BLOCK, Q - i_tile * BLOCK)
    weights = rows_from(result_of(p_weights, i_b, Q, K), first, count)
    factor = matrix_of(factor, i_b, K, K)
    x = rows_from(parts.solution, 0, count)
    o = tl.arange(0, BLOCK)
    product(x, rows_from(matrix_of(queries, i_b, Q, C), first, count), transposed(matrix_of(mean, i_b, K, C)))
    for j in range(0, K, BLOCK):
        inverse = invert_lower(load_tile(factor, j + o, j + o), tl.minimum(BLOCK, K - j))
        inverse_block = rows_from(parts.inverses, j, BLOCK)
        store_tile(inverse_block, inverse, o, o)
        eliminated = product_tile(x, transposed(factor), o, j + o, 0, j)
        solve_block_column(x, eliminated, transposed(inverse_block), parts.rest, j)
    for back in range(0, K, BLOCK):
        j = (K - 1) // BLOCK * BLOCK - back
        end = tl.minimum(j + BLOCK, K)
        x_after = Matrix(x.p + end, count, K - end, x.s_row, x.s_col)
        eliminated = product_tile(x_after, rows_from(factor, end, K - end), o, j + o, 0, K - end)
        solved = solve_block_column(x, eliminated, rows_from(parts.inverses, j, BLOCK), parts.rest, j)
        store_tile(weights, solved, o, j + o)


@triton.jit
def solve_block_column(x, eliminated, inverse_block, rest, j):
    """Block column ``j`` of X: what the solved columns leave of it, times an inverse block; returned, too."""
    o = tl.arange(0, BLOCK)
    store_tile(rest, load_tile(x, o, j + o) - eliminated, o, o)
    tl.debug_barrier()
    solved = product_tile(rest, inverse_block, o, o, 0, BLOCK)
    tl.debug_barrier()
    store_tile(x, solved, o, j + o)
    tl.debug_barrier()
    return solved


@implements("factor_addressing")
def factor_addressing(mean: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    (B, K, C), ld = mean.shape, row_stride(mean.shape[1])
    factor, status = mean.new_empty(B, K, K), mean.new_empty(B, dtype=torch.int32)
    if B:
        factor_kernel[(B,)](
            matrices(mean), numbers(ridge), factor, status, workspace(mean, B, factor_layout, K, ld, False),
            K, C, ld, ALIGNED=rows_aligned(mean), **factoring(K),
        )  # fmt: skip
    return factor, status


@implements("solve_factored")
def solve_factored(mean: Tensor, factor: Tensor, queries: Tensor) -> Tensor:
    (B, K, C), Q, ld = mean.shape, queries.shape[1], row_stride(mean.shape[1])
    weights, tiles, blocks = mean.new_empty(B, Q, K), blocks_of(Q), blocks_of(K)
    if weights.numel():
        solve_factored_kernel[(B * tiles,)](
            matrices(mean), matrices(factor), matrices(queries), weights,
            workspace(mean, B * tiles, solve_factored_layout, blocks, K, ld),
            K, C, Q, ld, tiles, blocks, ALIGNED=rows_aligned(mean, queries), **warps(4),
        )  # fmt: skip
    return weights
