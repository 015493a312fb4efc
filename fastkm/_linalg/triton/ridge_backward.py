"""The gradient of a read, and of a solve, which is a read of one iteration without values."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkm._linalg.triton.launch import (
    factoring,
    implements,
    matrices,
    numbers,
    precision_of,
    row_stride,
    rows_aligned,
    workspace,
)
from fastkm._linalg.triton.product import dot, product
from fastkm._linalg.triton.ridge import Factor, factor_system, solve_rows
from fastkm._linalg.triton.tiles import (
    BLOCK,
    assume_aligned,
    assume_fours,
    copy,
    end_of,
    fill_zero,
    load_tile,
    matrix_of,
    number_of,
    optional_matrix_of,
    place,
    place_after,
    result_of,
    rows_from,
    store_tile,
    transposed,
)

# Queries of one memory that the backward treats at once.
ROWS = tl.constexpr(64)


class Sums(NamedTuple):
    """What is summed over the queries of one memory."""

    to_system: Any  # Ā [K, K]
    to_target: Any  # Σ v (R z)ᵀ, then Ḡ [K, K]


class Rows(NamedTuple):
    """What one tile of queries needs, a row for each."""

    projected: Any  # R z [ROWS, K]
    buffer: Any  # between the two halves of a solve [ROWS, K]
    weights: Any  # w [ROWS, K]
    to_weights: Any  # w̄, at last v [ROWS, K]
    solved: Any  # u, then G v [ROWS, K]
    solutions: Any  # w₁, y₁, y₂, … of every iteration, one below the other [num_iters · ROWS, K]


class Parts(NamedTuple):
    """The workspace of one memory."""

    system: Any
    sums: Any
    rows: Any
    end: Any


@triton.jit
def read_backward_layout(p, K, ld, num_iters):
    lower = place(p, K, K, ld)
    inverse = place_after(lower, K, K, ld)
    gram = place_after(inverse, K, K, ld)
    to_system = place_after(gram, K, K, ld)
    to_target = place_after(to_system, K, K, ld)
    projected = place_after(to_target, ROWS, K, ld)
    buffer = place_after(projected, ROWS, K, ld)
    weights = place_after(buffer, ROWS, K, ld)
    to_weights = place_after(weights, ROWS, K, ld)
    solved = place_after(to_weights, ROWS, K, ld)
    solutions = place_after(solved, num_iters * ROWS, K, ld)
    end = end_of(solutions)
    rows = Rows(projected, buffer, weights, to_weights, solved, solutions)
    return Parts(Factor(lower, inverse, gram, end), Sums(to_system, to_target), rows, end)


@triton.jit
def rows_of(rows, count):
    """The rows of a tile with ``count`` queries; all solutions."""
    return Rows(
        rows_from(rows.projected, 0, count),
        rows_from(rows.buffer, 0, count),
        rows_from(rows.weights, 0, count),
        rows_from(rows.to_weights, 0, count),
        rows_from(rows.solved, 0, count),
        rows.solutions,
    )


@triton.jit
def read_backward_kernel(
    mean, queries, ridge, grad_values, grad_weights, p_to_mean, p_to_queries, p_to_ridge, workspaces,
    K, C, Q, ld, num_iters,
    SQUARED: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Read again, keeping y_i = A⁻¹ w_i, then back:

    u = λ A⁻¹ w̄,  Ā += u yᵀ,  w̄ ← w̄ − u  for every iteration;  v = A⁻¹ w̄,  Ā −= v w₁ᵀ;  λ̄ = tr Ā
    R̄ = Σ w ẑ̄ᵀ + Σ v zᵀ + (Ḡ + Ḡᵀ) R  with Ḡ = Ā, or squared Ḡ = Ā G + G Ā + Σ v (R z)ᵀ;  z̄ = Rᵀ v, squared Rᵀ G v

    Bytes moved: at least mean, queries and cotangents in and gradients out, each once. A memory's factor, its sums and
    one tile's solutions lie in the workspace.
    """
    C, mean, queries = assume_fours(C, ALIGNED), assume_aligned(mean, ALIGNED), assume_aligned(queries, ALIGNED)
    i_b = tl.program_id(0).to(tl.int64)
    mean, queries = matrix_of(mean, i_b, K, C), matrix_of(queries, i_b, Q, C)
    grad_values = optional_matrix_of(grad_values, i_b, Q, C)
    grad_weights = optional_matrix_of(grad_weights, i_b, Q, K)
    to_mean, to_queries = result_of(p_to_mean, i_b, K, C), result_of(p_to_queries, i_b, Q, C)
    parts = read_backward_layout(workspaces.p + i_b * workspaces.s_b, K, ld, num_iters)
    system, sums = parts.system, parts.sums
    ridge = number_of(ridge, i_b)
    good = factor_system(system, mean, ridge, SQUARED, SINGLE)
    ridge = tl.where(good, ridge, float("nan"))  # without a factor there is no gradient
    fill_zero(to_mean)
    fill_zero(sums.to_system)
    fill_zero(sums.to_target)
    to_ridge = tl.full((), 0, tl.float64)
    for first in range(0, Q, ROWS):
        count = tl.minimum(ROWS, Q - first)
        z, rows = rows_from(queries, first, count), rows_of(parts.rows, count)
        read_again(rows, z, mean, ridge, system, num_iters, SQUARED, PRECISION)
        back_through_values(to_mean, rows, mean, grad_values, grad_weights, first, PRECISION)
        to_ridge = back_through_iterations(to_ridge, sums, rows, ridge, good, system.inverse, num_iters)
        back_through_projection(to_mean, rows_from(to_queries, first, count), sums, rows, z, mean, system.gram,
                                SQUARED, PRECISION)  # fmt: skip

    # Through the Gram matrix, whose cotangent is not symmetric.
    if SQUARED:
        product(sums.to_target, sums.to_system, system.gram, accumulate=True)
        product(sums.to_target, system.gram, sums.to_system, accumulate=True)
        to_gram = sums.to_target
    else:
        to_gram = sums.to_system
    product(to_mean, to_gram, mean, accumulate=True)
    product(to_mean, transposed(to_gram), mean, accumulate=True)
    tl.store(p_to_ridge + i_b, to_ridge.to(tl.float32))


@triton.jit
def read_again(rows, z, mean, ridge, system, num_iters, SQUARED: tl.constexpr, PRECISION: tl.constexpr):
    """R z, w₁ and the solutions of all iterations, and the weights."""
    count = z.rows
    product(rows.projected, z, transposed(mean), precision=PRECISION)
    first = rows_from(rows.solutions, 0, count)
    if SQUARED:
        product(rows.weights, rows.projected, system.gram)
        solve_rows(first, rows.weights, system.inverse, rows.buffer)
    else:
        solve_rows(first, rows.projected, system.inverse, rows.buffer)
    copy(rows.weights, first)
    for n in range(1, num_iters):
        solution = rows_from(rows.solutions, n * ROWS, count)
        solve_rows(solution, rows.weights, system.inverse, rows.buffer)
        subtract(rows.weights, solution, ridge)


@triton.jit
def subtract(to, x, scale):
    """to −= scale x for rows of queries. Ends with a barrier."""
    for k in range(0, to.columns, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        for q in range(0, to.rows, BLOCK):
            o_q = q + tl.arange(0, BLOCK)
            store_tile(to, load_tile(to, o_q, o_k) - scale * load_tile(x, o_q, o_k), o_q, o_k)
    tl.debug_barrier()


@triton.jit
def back_through_values(to_mean, rows, mean, grad_values, grad_weights, first, PRECISION: tl.constexpr):
    """w̄ from the cotangents of the weights and of the values ẑ = Rᵀ w."""
    count = rows.weights.rows
    if len(grad_weights) == 0:
        fill_zero(rows.to_weights)
    else:
        copy(rows.to_weights, rows_from(grad_weights, first, count))
    if len(grad_values) != 0:
        b_grad = rows_from(grad_values, first, count)
        product(rows.to_weights, b_grad, transposed(mean), accumulate=True, precision=PRECISION)
        product(to_mean, transposed(rows.weights), b_grad, accumulate=True, precision=PRECISION)


@triton.jit
def back_through_iterations(to_ridge, sums, rows, ridge, good, inverse, num_iters):
    """Through the iterations, and last through the address, which is one with v in place of −u. Returns λ̄."""
    count = rows.weights.rows
    for back in range(num_iters):
        n = num_iters - 1 - back
        solution = rows_from(rows.solutions, n * ROWS, count)
        scale = tl.where(n == 0, tl.where(good, -1.0, float("nan")), ridge)
        solve_rows(rows.solved, rows.to_weights, inverse, rows.buffer, scale=scale)
        product(sums.to_system, transposed(rows.solved), solution, accumulate=True)
        for k in range(0, solution.columns, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            for q in range(0, count, BLOCK):
                o_q = q + tl.arange(0, BLOCK)
                u = load_tile(rows.solved, o_q, o_k)
                tile = tl.where(n == 0, -u, load_tile(rows.to_weights, o_q, o_k) - u)
                store_tile(rows.to_weights, tile, o_q, o_k)
        tl.debug_barrier()
        to_ridge -= dot(rows.to_weights, solution)
    return to_ridge


@triton.jit
def back_through_projection(
    to_mean, to_queries, sums, rows, z, mean, gram, SQUARED: tl.constexpr, PRECISION: tl.constexpr
):
    """From v to the mean and the queries."""
    if SQUARED:
        product(sums.to_target, transposed(rows.to_weights), rows.projected, accumulate=True)
        product(rows.solved, rows.to_weights, gram)
        v = rows.solved
    else:
        v = rows.to_weights
    product(to_mean, transposed(v), z, accumulate=True, precision=PRECISION)
    product(to_queries, v, mean, precision=PRECISION)


@implements("read_backward")
def read_backward(mean, queries, ridge, num_iters, squared_gram, precision, grad_values, grad_weights):
    (B, K, C), Q, ld = mean.shape, queries.shape[1], row_stride(mean.shape[1])
    to = [mean.new_empty(x.shape) for x in (mean, queries, ridge)]
    if B:
        read_backward_kernel[(B,)](
            matrices(mean), matrices(queries), numbers(ridge), matrices(grad_values), matrices(grad_weights), *to,
            workspace(mean, B, read_backward_layout, K, ld, num_iters), K, C, Q, ld, num_iters, SQUARED=squared_gram,
            PRECISION=precision_of(precision), ALIGNED=rows_aligned(mean, queries), **factoring(K),
        )  # fmt: skip
    return tuple(to)
