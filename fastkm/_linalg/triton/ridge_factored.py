"""Reads in two steps, for queries that come one after the other: what a memory needs, and then the queries."""

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
    precision_of,
    row_stride,
    rows_aligned,
    warps,
    workspace,
)
from fastkm._linalg.triton.product import product, product_tile
from fastkm._linalg.triton.ridge import factor_layout, factor_system, scratch_layout, solve_rows
from fastkm._linalg.triton.ridge_backward import read_backward, subtract
from fastkm._linalg.triton.tiles import (
    BLOCK,
    Matrix,
    assume_aligned,
    assume_fours,
    copy,
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
from fastkm._runtime.options import CODE_DTYPES


@triton.jit
def factor_kernel(
    mean, ridge, p_lower, p_gram, p_status, workspaces, K, C, ld,
    SQUARED: tl.constexpr, ALIGNED: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """L with L Lᵀ = A = G + λI, G = R Rᵀ; SQUARED: A = G² + λI, and G. L⁻¹ and G stay in the workspace.

    Bytes moved: mean in, L and G out, once each; L⁻¹ out for the next launch.
    """
    C, mean = assume_fours(C, ALIGNED), assume_aligned(mean, ALIGNED)
    i_b = tl.program_id(0).to(tl.int64)
    system = factor_layout(workspaces.p + i_b * workspaces.s_b, K, ld, SQUARED)
    good = factor_system(system, matrix_of(mean, i_b, K, C), number_of(ridge, i_b), SQUARED, SINGLE)
    to = result_of(p_lower, i_b, K, K)
    for i in range(0, K, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, K, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            tile = load_tile(transposed(system.lower), o_i, o_j)
            store_tile(to, tl.where(lower_triangle(o_i, o_j), tile, 0.0), o_i, o_j)
    if SQUARED:
        copy(result_of(p_gram, i_b, K, K), system.gram)
    tl.store(p_status + i_b, tl.where(good, 0, IS_INDEFINITE))


@triton.jit
def pseudoinverse_kernel(mean, p_pseudoinverse, workspaces, scratches, K, C, ld, tiles, SQUARED: tl.constexpr):
    """Rows of Rᵀ A⁻¹, or SQUARED of Rᵀ G A⁻¹, from the workspace of ``factor_kernel``.

    Bytes moved: mean in, pseudo-inverse out, once each; L⁻¹ and G once a tile, from the second-level cache.
    """
    i = tl.program_id(0)
    scratch = scratch_layout(scratches.p + i.to(tl.int64) * scratches.s_b, BLOCK, K, ld)
    i_tile, i_b = i % tiles, (i // tiles).to(tl.int64)
    system = factor_layout(workspaces.p + i_b * workspaces.s_b, K, ld, SQUARED)
    first, count = tl.cast(i_tile, tl.int64) * BLOCK, tl.minimum(BLOCK, C - i_tile * BLOCK)
    out = rows_from(result_of(p_pseudoinverse, i_b, C, K), first, count)
    rows = rows_from(transposed(matrix_of(mean, i_b, K, C)), first, count)
    buffer = rows_from(scratch.solved, 0, count)
    if SQUARED:
        target = rows_from(scratch.projected, 0, count)
        product(target, rows, system.gram)
        solve_rows(out, target, system.inverse, buffer)
    else:
        solve_rows(out, rows, system.inverse, buffer)


class Parts(NamedTuple):
    """The workspace of one tile of queries, for iterations."""

    solution: Any  # A⁻¹ w of every query, block column by block column [BLOCK, K]
    rest: Any  # the block column that is being solved [BLOCK, BLOCK]
    inverses: Any  # of the diagonal blocks of L, one below the other [K, BLOCK] and what fills the last
    end: Any


@triton.jit
def read_factored_layout(p, blocks, K, ld):
    solution = place(p, BLOCK, K, ld)
    rest = place_after(solution, BLOCK, BLOCK, BLOCK)
    inverses = place_after(rest, blocks * BLOCK, BLOCK, BLOCK)
    return Parts(solution, rest, inverses, end_of(inverses))


@triton.jit
def read_factored_kernel(
    mean, lower, pseudoinverse, queries, ridge, p_values, p_weights, workspaces, K, C, Q, ld, num_iters, tiles, blocks,
    ITERATES: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of queries:  w₁ = z R⁺,  w ← w − λ A⁻¹ w,  ẑ = Rᵀ w unless ``p_values`` is None.

    Bytes moved: queries in, weights and values out once; R⁺ and mean once a tile of queries, from the second-level
    cache. ITERATES: the factor, too, twice an iteration.
    """
    C, mean, queries = assume_fours(C, ALIGNED), assume_aligned(mean, ALIGNED), assume_aligned(queries, ALIGNED)
    i = tl.program_id(0)
    i_tile, i_b = i % tiles, (i // tiles).to(tl.int64)
    first, count = tl.cast(i_tile, tl.int64) * BLOCK, tl.minimum(BLOCK, Q - i_tile * BLOCK)
    weights = rows_from(result_of(p_weights, i_b, Q, K), first, count)
    codes = rows_from(matrix_of(queries, i_b, Q, C), first, count)
    product(weights, codes, matrix_of(pseudoinverse, i_b, C, K), precision=PRECISION)
    if ITERATES:
        parts = read_factored_layout(workspaces.p + i.to(tl.int64) * workspaces.s_b, blocks, K, ld)
        factor, x = matrix_of(lower, i_b, K, K), rows_from(parts.solution, 0, count)
        invert_diagonal_blocks(parts.inverses, factor)
        for _ in range(1, num_iters):
            copy(x, weights)
            solve_blocked(x, factor, parts.inverses, parts.rest)
            subtract(weights, x, number_of(ridge, i_b))
    if p_values is not None:
        product(rows_from(result_of(p_values, i_b, Q, C), first, count), weights, matrix_of(mean, i_b, K, C),
                precision=PRECISION)  # fmt: skip


@triton.jit
def invert_diagonal_blocks(inverses, factor):
    o = tl.arange(0, BLOCK)
    for j in range(0, factor.rows, BLOCK):
        inverse = invert_lower(load_tile(factor, j + o, j + o), tl.minimum(BLOCK, factor.rows - j))
        store_tile(rows_from(inverses, j, BLOCK), inverse, o, o)
    tl.debug_barrier()


@triton.jit
def solve_blocked(x, factor, inverses, rest):
    """X ← X L⁻ᵀ L⁻¹ for right-hand sides in the rows of X, block column by block column."""
    o, K = tl.arange(0, BLOCK), factor.rows
    for j in range(0, K, BLOCK):
        eliminated = product_tile(x, transposed(factor), o, j + o, 0, j)
        solve_block_column(x, eliminated, transposed(rows_from(inverses, j, BLOCK)), rest, j)
    for back in range(0, K, BLOCK):
        j = (K - 1) // BLOCK * BLOCK - back
        end = tl.minimum(j + BLOCK, K)
        x_after = Matrix(x.p + end, x.rows, K - end, x.s_row, x.s_col)
        eliminated = product_tile(x_after, rows_from(factor, end, K - end), o, j + o, 0, K - end)
        solve_block_column(x, eliminated, rows_from(inverses, j, BLOCK), rest, j)


@triton.jit
def solve_block_column(x, eliminated, inverse_block, rest, j):
    """Block column ``j`` of X: what the solved columns leave of it, times an inverse block."""
    o = tl.arange(0, BLOCK)
    store_tile(rest, load_tile(x, o, j + o) - eliminated, o, o)
    tl.debug_barrier()
    solved = product_tile(rest, inverse_block, o, o, 0, BLOCK)
    tl.debug_barrier()
    store_tile(x, solved, o, j + o)
    tl.debug_barrier()


@implements("factor_addressing")
def factor_addressing(mean: Tensor, ridge: Tensor, squared_gram: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, K, C), ld, tiles = mean.shape, row_stride(mean.shape[1]), blocks_of(mean.shape[2])
    lower, pseudoinverse = mean.new_empty(B, K, K), mean.new_empty(B, C, K)
    gram, status = mean.new_empty(B, K if squared_gram else 0, K), mean.new_empty(B, dtype=torch.int32)
    if B:
        systems = workspace(mean, B, factor_layout, K, ld, squared_gram)
        factor_kernel[(B,)](
            matrices(mean), numbers(ridge), lower, gram, status, systems,
            K, C, ld, SQUARED=squared_gram, ALIGNED=rows_aligned(mean), **factoring(K),
        )  # fmt: skip
        if pseudoinverse.numel():
            pseudoinverse_kernel[(B * tiles,)](
                matrices(mean), pseudoinverse, systems, workspace(mean, B * tiles, scratch_layout, BLOCK.value, K, ld),
                K, C, ld, tiles, SQUARED=squared_gram, **warps(4),
            )  # fmt: skip
    return pseudoinverse, lower, gram, status


def launch_read_factored(mean, queries, ridge, lower, pseudoinverse, num_iters, precision, values):
    """Weights and status; ``values`` are stored, unless there are none."""
    (B, K, C), Q, ld = mean.shape, queries.shape[1], row_stride(mean.shape[1])
    weights, status = mean.new_empty(B, Q, K), mean.new_zeros(B, dtype=torch.int32)
    tiles, blocks, iterates = blocks_of(Q), blocks_of(K), num_iters > 1
    if B * tiles:
        read_factored_kernel[(B * tiles,)](
            matrices(mean), matrices(lower), matrices(pseudoinverse), matrices(queries), numbers(ridge), values,
            weights,
            workspace(mean, B * tiles if iterates else 1, read_factored_layout, blocks, K, ld),
            K, C, Q, ld, num_iters, tiles, blocks, ITERATES=iterates, PRECISION=precision_of(precision),
            ALIGNED=rows_aligned(mean, queries), **warps(4),
        )  # fmt: skip
    return weights, status


@implements("solve_factored")
def solve_factored(mean, queries, ridge, lower, pseudoinverse, gram):
    return launch_read_factored(mean, queries, ridge, lower, pseudoinverse, 1, 0, None)


@implements("read_factored")
def read_factored(mean, queries, ridge, lower, pseudoinverse, gram, num_iters, precision, values_type=None):
    values = mean.new_empty(queries.shape, dtype=CODE_DTYPES[values_type or 0])
    return values, *launch_read_factored(mean, queries, ridge, lower, pseudoinverse, num_iters, precision, values)


@implements("read_factored_backward")
def read_factored_backward(mean, queries, ridge, lower, pseudoinverse, gram, num_iters, precision, *grads):
    """The gradient of a read that factors anew, by factoring anew."""
    return read_backward(mean, queries, ridge, num_iters, gram.shape[1] > 0, precision, *grads)
