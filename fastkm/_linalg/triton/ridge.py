"""Weights of queries: ridge regression on the rows of a memory, and what is read with them.

A memory is factored once; its queries are answered tile by tile without leaving K. Many memories with few queries take
one launch, a program a memory. Few memories with many queries take two: a program a memory factors, then a program a
tile of queries answers.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkm._linalg.triton.factor import IS_INDEFINITE, factor
from fastkm._linalg.triton.launch import (
    blocks_of,
    factoring,
    matrices,
    numbers,
    precision_of,
    row_stride,
    rows_aligned,
    workspace,
)
from fastkm._linalg.triton.product import product
from fastkm._linalg.triton.tiles import (
    BLOCK,
    add_to_diagonal,
    assume_aligned,
    assume_fours,
    end_of,
    matrix_of,
    number_of,
    place,
    place_after,
    result_of,
    rows_from,
    transposed,
)

# Fewer memories than this do not fill a chip, so their queries are spread over it.
FEW_MEMORIES = 256


class Factor(NamedTuple):
    """The factored system of one memory: Lᵀ, L⁻¹ and G, where it is kept."""

    lower: Any  # A, then Lᵀ [K, K]
    inverse: Any  # L⁻¹ [K, K]
    gram: Any  # G = R Rᵀ [K, K]
    end: Any


@triton.jit
def factor_layout(p, K, ld, WITH_GRAM: tl.constexpr):
    lower = place(p, K, K, ld)
    inverse = place_after(lower, K, K, ld)
    gram = place_after(inverse, K, K, ld) if WITH_GRAM else inverse
    return Factor(lower, inverse, gram, end_of(gram))


class Scratch(NamedTuple):
    """What one tile of queries needs beside its outputs."""

    projected: Any  # R z of every query [BLOCK, K]
    solved: Any  # between the two halves of a solve [BLOCK, K]
    end: Any


@triton.jit
def scratch_layout(p, rows, K, ld):
    projected = place(p, rows, K, ld)
    solved = place_after(projected, rows, K, ld)
    return Scratch(projected, solved, end_of(solved))


@triton.jit
def factor_system(system, mean, ridge, SQUARED: tl.constexpr, SINGLE: tl.constexpr):
    """Factor A = G + λI with G = R Rᵀ; SQUARED: A = G² + λI, keeping G. Returns whether A is positive definite."""
    if SQUARED:
        product(system.gram, mean, transposed(mean))
        product(system.lower, system.gram, system.gram)
    else:
        product(system.lower, mean, transposed(mean))
    add_to_diagonal(system.lower, ridge)
    _, good = factor(system.lower, system.inverse, SINGLE)
    return good


@triton.jit
def solve_rows(out, x, inverse, buffer, scale=1.0, accumulate: tl.constexpr = False):
    """out = scale X A⁻¹ for right-hand sides in the rows of X, or out += that; ``out`` may be X."""
    product(buffer, x, transposed(inverse))
    product(out, buffer, inverse, scale=scale, accumulate=accumulate)


@triton.jit
def read_kernel(
    mean, queries, ridge, p_values, p_weights, p_status, workspaces, scratches, K, C, Q, ld, num_iters, tiles,
    FACTOR: tl.constexpr, SPLIT: tl.constexpr, SQUARED: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """w₁ = A⁻¹ R z (squared: A⁻¹ G R z),  w ← w − λ A⁻¹ w,  ẑ = Rᵀ w unless ``p_values`` is None.

    SPLIT: one of the two phases only, as FACTOR says.

    Bytes moved: mean and queries in, values and weights out, once each; the factor (2 K²) and a tile's weights stay in
    the cache. With a launch for each phase the factor goes out once and in again for every tile, from the second-level
    cache.
    """
    C, mean, queries = assume_fours(C, ALIGNED), assume_aligned(mean, ALIGNED), assume_aligned(queries, ALIGNED)
    i = tl.program_id(0)
    scratch = scratch_layout(scratches.p + i.to(tl.int64) * scratches.s_b, BLOCK, K, ld)
    i_tile = 0
    if SPLIT and not FACTOR:
        i_tile = i % tiles
        i = i // tiles
    i_b = i.to(tl.int64)
    mean = matrix_of(mean, i_b, K, C)
    system = factor_layout(workspaces.p + i_b * workspaces.s_b, K, ld, SQUARED)
    ridge = number_of(ridge, i_b)
    if FACTOR:
        good = factor_system(system, mean, ridge, SQUARED, SINGLE)
        tl.store(p_status + i_b, tl.where(good, 0, IS_INDEFINITE))
    if not (SPLIT and FACTOR):
        last = i_tile + 1 if SPLIT else tiles
        for j in range(i_tile, last):
            first, count = tl.cast(j, tl.int64) * BLOCK, tl.minimum(BLOCK, Q - j * BLOCK)
            weights = rows_from(result_of(p_weights, i_b, Q, K), first, count)
            find_weights(weights, rows_from(matrix_of(queries, i_b, Q, C), first, count), mean, ridge, system, scratch,
                         num_iters, SQUARED, PRECISION)  # fmt: skip
            if p_values is not None:
                values = rows_from(result_of(p_values, i_b, Q, C), first, count)
                product(values, weights, mean, precision=PRECISION)


@triton.jit
def find_weights(
    weights, queries, mean, ridge, system, scratch, num_iters, SQUARED: tl.constexpr, PRECISION: tl.constexpr
):
    """Weights of one tile of queries."""
    projected, solved = rows_from(scratch.projected, 0, weights.rows), rows_from(scratch.solved, 0, weights.rows)
    product(projected, queries, transposed(mean), precision=PRECISION)
    if SQUARED:
        product(weights, projected, system.gram)
        solve_rows(weights, weights, system.inverse, solved)
    else:
        solve_rows(weights, projected, system.inverse, solved)
    for _ in range(1, num_iters):
        solve_rows(weights, weights, system.inverse, solved, scale=-ridge, accumulate=True)


def launch_read(
    mean: Tensor,
    queries: Tensor,
    ridge: Tensor,
    num_iters: int,
    squared_gram: bool,
    precision: int,
    values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weights and status; ``values`` are stored, unless there are none."""
    (B, K, C), Q, ld = mean.shape, queries.shape[1], row_stride(mean.shape[1])
    weights, status = mean.new_empty(B, Q, K), mean.new_empty(B, dtype=torch.int32)
    if not B:
        return weights, status
    tiles = blocks_of(Q)
    split = B < FEW_MEMORIES and tiles > 1
    systems = workspace(mean, B, factor_layout, K, ld, squared_gram)
    scratches = workspace(mean, B * tiles if split else B, scratch_layout, BLOCK.value, K, ld)
    for phase in (True, False) if split else (True,):
        read_kernel[(B if phase else B * tiles,)](
            matrices(mean), matrices(queries), numbers(ridge), values, weights, status, systems, scratches,
            K, C, Q, ld, num_iters, tiles, FACTOR=phase, SPLIT=split, SQUARED=squared_gram,
            PRECISION=precision_of(precision), ALIGNED=rows_aligned(mean, queries), **factoring(K),
        )  # fmt: skip
    return weights, status
