"""Triton kernels of read, solve_addressing, factor_addressing and solve_factored.

A memory is factored once; its queries are answered tile by tile without leaving K. Many memories with few queries take
one launch, a program a memory. Few memories with many queries take two: a program a memory factors, then a program a
tile of queries answers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkm._linalg.triton import (
    BLOCK,
    IS_INDEFINITE,
    copy_or_zero,
    factor,
    fours,
    implements,
    invert_lower,
    load_tile,
    precision_of,
    product,
    row_stride,
    rows_aligned,
    square,
    store_tile,
    strides,
    tile_product,
    warps,
    workspace,
)
from fastkm._runtime.autograd import differentiable
from fastkm.reading.attractor import without_gradient


@triton.jit
def factor_memory(
    p_mean, s_mr, s_mc, ridge, p_lower, p_inverse, p_gram, K, C, ld,
    SQUARED: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Lᵀ and L⁻¹ of A = G + λI with G = R Rᵀ; squared: of G² + λI, keeping G. Returns whether A can be factored."""
    if SQUARED:
        product(p_gram, ld, 1, p_mean, s_mr, s_mc, p_mean, s_mc, s_mr, K, K, C, 1.0, False, "ieee", BLOCK, BLOCK, 16)
        product(p_lower, ld, 1, p_gram, ld, 1, p_gram, ld, 1, K, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    else:
        product(p_lower, ld, 1, p_mean, s_mr, s_mc, p_mean, s_mc, s_mr, K, K, C, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    for k in range(0, K, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        at = p_lower + o_k.to(tl.int64) * (ld + 1)
        tl.store(at, tl.load(at, mask=o_k < K, other=0.0) + ridge, mask=o_k < K)
    tl.debug_barrier()
    _, good = factor(p_lower, p_inverse, K, ld, BLOCK, SINGLE)
    return good


@triton.jit
def solve(p_to, s_to, p_x, s_x, p_inverse, p_work, count, K, ld, alpha, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of right-hand sides X [count, K]:  out (+)= alpha X A⁻¹; ``out`` may be X."""
    product(p_work, ld, 1, p_x, s_x, 1, p_inverse, 1, ld, count, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_to, s_to, 1, p_work, ld, 1, p_inverse, ld, 1, count, K, K, alpha, ADD, "ieee", BLOCK, BLOCK, 16)


# Bytes moved: mean and queries in, values and weights out, once each; the factor (2 K²) and a tile's weights stay in
# the cache. With a launch for each phase the factor goes out once and in again for every tile, from the
# second-level cache.
@triton.jit
def read_kernel(
    p_mean, s_mb, s_mr, s_mc, p_queries, s_qb, s_qr, s_qc, p_ridge, s_lb, p_values, p_weights, p_info,
    p_work, s_work, p_scratch, s_scratch, K, C, Q, ld, num_iters, tiles,
    FACTOR: tl.constexpr, SPLIT: tl.constexpr, WITH_VALUES: tl.constexpr, SQUARED: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """w₁ = A⁻¹ R z (squared: A⁻¹ G R z),  w ← w − λ A⁻¹ w,  ẑ = Rᵀ w. SPLIT: one of the two phases only."""
    C, s_mb, s_mr = fours(C, ALIGNED), fours(s_mb, ALIGNED), fours(s_mr, ALIGNED)
    s_qb, s_qr = fours(s_qb, ALIGNED), fours(s_qr, ALIGNED)
    i = tl.program_id(0)
    p_x = p_scratch + i.to(tl.int64) * s_scratch
    p_y = p_x + BLOCK * ld
    i_tile = 0
    if SPLIT and not FACTOR:
        i_tile = i % tiles
        i = i // tiles
    i_b = i.to(tl.int64)
    p_mean += i_b * s_mb
    p_lower = p_work + i_b * s_work
    p_inverse = p_lower + K * ld
    p_gram = p_inverse + K * ld
    ridge = tl.load(p_ridge + i_b * s_lb)
    if FACTOR:
        good = factor_memory(p_mean, s_mr, s_mc, ridge, p_lower, p_inverse, p_gram, K, C, ld, SQUARED, BLOCK, SINGLE)
        tl.store(p_info + i_b, tl.where(good, 0, IS_INDEFINITE))
    if not (SPLIT and FACTOR):
        last = i_tile + 1 if SPLIT else tiles
        for j in range(i_tile, last):
            first = tl.cast(j, tl.int64) * BLOCK
            count = tl.minimum(BLOCK, Q - j * BLOCK)
            p_w = p_weights + (i_b * Q + first) * K
            p_q = p_queries + i_b * s_qb + first * s_qr
            product(p_x, ld, 1, p_q, s_qr, s_qc, p_mean, s_mc, s_mr, count, K, C, 1.0, False, PRECISION,
                    BLOCK, BLOCK, 16)  # fmt: skip
            if SQUARED:
                product(p_w, K, 1, p_x, ld, 1, p_gram, ld, 1, count, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
                solve(p_w, K, p_w, K, p_inverse, p_y, count, K, ld, 1.0, False, BLOCK)
            else:
                solve(p_w, K, p_x, ld, p_inverse, p_y, count, K, ld, 1.0, False, BLOCK)
            for _ in range(1, num_iters):
                solve(p_w, K, p_w, K, p_inverse, p_y, count, K, ld, -ridge, True, BLOCK)
            if WITH_VALUES:
                product(p_values + (i_b * Q + first) * C, C, 1, p_w, K, 1, p_mean, s_mr, s_mc, count, C, K, 1.0, False,
                        PRECISION, BLOCK, BLOCK, 16)  # fmt: skip


# ------------------------------------------------------------------------------------------------- factor, then solve


# Bytes moved: mean in, factor out, once each.
@triton.jit
def factor_kernel(
    p_mean, s_mb, s_mr, s_mc, p_ridge, s_lb, p_factor, p_info, p_work, s_work, K, C, ld,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    C, s_mb, s_mr = fours(C, ALIGNED), fours(s_mb, ALIGNED), fours(s_mr, ALIGNED)
    i_b = tl.program_id(0).to(tl.int64)
    p_upper = p_work + i_b * s_work
    p_factor += i_b * K * K
    good = factor_memory(
        p_mean + i_b * s_mb, s_mr, s_mc, tl.load(p_ridge + i_b * s_lb), p_upper, p_upper + K * ld, p_upper, K, C, ld,
        False, BLOCK, SINGLE,
    )  # fmt: skip
    for i in range(0, K, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, K, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            b = load_tile(p_upper, o_i, o_j, K, K, 1, ld)
            store_tile(p_factor, tl.where(o_i[:, None] >= o_j[None, :], b, 0.0), o_i, o_j, K, K, K, 1)
    tl.store(p_info + i_b, tl.where(good, 0, IS_INDEFINITE))


# Bytes moved: queries in and weights out once; mean and factor once a tile of queries, from the second-level cache.
@triton.jit
def solve_factored_kernel(
    p_mean, s_mb, s_mr, s_mc, p_factor, s_fb, s_fr, s_fc, p_queries, s_qb, s_qr, s_qc, p_weights,
    p_scratch, s_scratch, K, C, Q, ld, tiles, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of queries:  W = (Z Rᵀ) L⁻ᵀ L⁻¹, block column by block column."""
    C, s_mb, s_mr = fours(C, ALIGNED), fours(s_mb, ALIGNED), fours(s_mr, ALIGNED)
    s_qb, s_qr = fours(s_qb, ALIGNED), fours(s_qr, ALIGNED)
    i = tl.program_id(0)
    i_tile = i % tiles
    i_b = (i // tiles).to(tl.int64)
    p_x = p_scratch + i.to(tl.int64) * s_scratch
    p_rest = p_x + BLOCK * ld
    p_inverses = p_rest + BLOCK * BLOCK  # of the diagonal blocks
    first = tl.cast(i_tile, tl.int64) * BLOCK
    count = tl.minimum(BLOCK, Q - i_tile * BLOCK)
    p_weights += (i_b * Q + first) * K
    p_factor += i_b * s_fb
    o = tl.arange(0, BLOCK)
    product(p_x, ld, 1, p_queries + i_b * s_qb + first * s_qr, s_qr, s_qc, p_mean + i_b * s_mb, s_mc, s_mr,
            count, K, C, 1.0, False, "ieee", BLOCK, BLOCK, 16)  # fmt: skip
    for j in range(0, K, BLOCK):
        o_j = j + o
        lower = load_tile(p_factor, o_j, o_j, K, K, s_fr, s_fc)
        inverse = invert_lower(lower, tl.minimum(BLOCK, K - j))
        store_tile(p_inverses + j * BLOCK, inverse, o, o, BLOCK, BLOCK, BLOCK, 1)
        taken = tile_product(p_x, ld, 1, p_factor, s_fc, s_fr, o, o_j, count, K, 0, j, "ieee", 16)
        rest = load_tile(p_x, o, o_j, count, K, ld, 1) - taken
        store_tile(p_rest, rest, o, o, BLOCK, BLOCK, BLOCK, 1)
        tl.debug_barrier()
        solved = tile_product(p_rest, BLOCK, 1, p_inverses + j * BLOCK, 1, BLOCK, o, o, BLOCK, BLOCK, 0, BLOCK,
                              "ieee", 16)  # fmt: skip
        tl.debug_barrier()
        store_tile(p_x, solved, o, o_j, count, K, ld, 1)
        tl.debug_barrier()
    for back in range(0, K, BLOCK):
        j = (K - 1) // BLOCK * BLOCK - back
        o_j = j + o
        # Columns below block j, counted from its end.
        after = tl.minimum(j + BLOCK, K)
        taken = tile_product(p_x + after, ld, 1, p_factor + tl.cast(after, tl.int64) * s_fr, s_fr, s_fc, o, o_j,
                             count, K, 0, K - after, "ieee", 16)  # fmt: skip
        rest = load_tile(p_x, o, o_j, count, K, ld, 1) - taken
        store_tile(p_rest, rest, o, o, BLOCK, BLOCK, BLOCK, 1)
        tl.debug_barrier()
        solved = tile_product(p_rest, BLOCK, 1, p_inverses + j * BLOCK, BLOCK, 1, o, o, BLOCK, BLOCK, 0, BLOCK,
                              "ieee", 16)  # fmt: skip
        tl.debug_barrier()
        store_tile(p_x, solved, o, o_j, count, K, ld, 1)
        store_tile(p_weights, solved, o, o_j, count, K, K, 1)
        tl.debug_barrier()


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit
def inner_product(p_x, p_y, rows, columns, ld, BLOCK: tl.constexpr):
    """Sum of the products of entries of two matrices."""
    total = tl.full((), 0, tl.float64)
    for i in range(0, rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            x = load_tile(p_x, o_i, o_j, rows, columns, ld, 1)
            y = load_tile(p_y, o_i, o_j, rows, columns, ld, 1)
            total += tl.sum(tl.sum(x * y, 1).to(tl.float64), 0)
    return total


# Bytes moved: at least mean, queries and cotangents in and gradients out, each once; a memory's factor, its K² and KC
# sums and one tile's solutions are working memory.
@triton.jit
def read_backward_kernel(
    p_mean, s_mb, s_mr, s_mc, p_queries, s_qb, s_qr, s_qc, p_ridge, s_lb,
    p_grad_values, s_vb, s_vr, s_vc, p_grad_weights, s_wb, s_wr, s_wc, p_to_mean, p_to_queries, p_to_ridge,
    p_work, s_work, K, C, Q, ld, num_iters,
    WITH_VALUES: tl.constexpr, WITH_WEIGHTS: tl.constexpr, SQUARED: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Read again, keeping y_i = A⁻¹ w_i, then back:

    u = λ A⁻¹ w̄,  Ā += u yᵀ,  w̄ ← w̄ − u  for every iteration;  v = A⁻¹ w̄,  Ā −= v w₁ᵀ;  λ̄ = tr Ā
    R̄ = Σ w ẑ̄ᵀ + Σ v zᵀ + (Ḡ + Ḡᵀ) R  with Ḡ = Ā, or squared Ḡ = Ā G + G Ā + Σ v (R z)ᵀ;  z̄ = Rᵀ v, squared Rᵀ G v
    """
    C, s_mb, s_mr = fours(C, ALIGNED), fours(s_mb, ALIGNED), fours(s_mr, ALIGNED)
    s_qb, s_qr = fours(s_qb, ALIGNED), fours(s_qr, ALIGNED)
    i_b = tl.program_id(0).to(tl.int64)
    p_mean += i_b * s_mb
    p_to_mean += i_b * K * C
    p_lower = p_work + i_b * s_work
    p_inverse = p_lower + K * ld
    p_gram = p_inverse + K * ld
    p_solved = p_gram + K * ld  # Ā
    p_target = p_solved + K * ld  # Σ v (R z)ᵀ, then Ḡ
    p_x = p_target + K * ld  # R z
    p_y = p_x + ROWS * ld
    p_w = p_y + ROWS * ld
    p_w_bar = p_w + ROWS * ld
    p_u = p_w_bar + ROWS * ld
    p_solutions = p_u + ROWS * ld  # w₁, then y₁, y₂, …
    ridge = tl.load(p_ridge + i_b * s_lb)
    good = factor_memory(p_mean, s_mr, s_mc, ridge, p_lower, p_inverse, p_gram, K, C, ld, SQUARED, BLOCK, SINGLE)
    ridge = tl.where(good, ridge, float("nan"))  # without a factor there is no gradient
    copy_or_zero(p_to_mean, C, p_mean, s_mr, s_mc, K, C, False, BLOCK)
    copy_or_zero(p_solved, ld, p_mean, s_mr, s_mc, K, K, False, BLOCK)
    copy_or_zero(p_target, ld, p_mean, s_mr, s_mc, K, K, False, BLOCK)
    to_ridge = tl.full((), 0, tl.float64)
    for first in range(0, Q, ROWS):
        count = tl.minimum(ROWS, Q - first)
        o_first = tl.cast(first, tl.int64)
        p_z = p_queries + i_b * s_qb + o_first * s_qr

        # Read again.
        product(p_x, ld, 1, p_z, s_qr, s_qc, p_mean, s_mc, s_mr, count, K, C, 1.0, False, PRECISION, BLOCK, BLOCK, 16)
        if SQUARED:
            product(p_w, ld, 1, p_x, ld, 1, p_gram, ld, 1, count, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
            solve(p_solutions, ld, p_w, ld, p_inverse, p_y, count, K, ld, 1.0, False, BLOCK)
        else:
            solve(p_solutions, ld, p_x, ld, p_inverse, p_y, count, K, ld, 1.0, False, BLOCK)
        copy_or_zero(p_w, ld, p_solutions, ld, 1, count, K, True, BLOCK)
        for n in range(1, num_iters):
            p_n = p_solutions + tl.cast(n, tl.int64) * ROWS * ld
            solve(p_n, ld, p_w, ld, p_inverse, p_y, count, K, ld, 1.0, False, BLOCK)
            for k in range(0, K, BLOCK):
                o_k = k + tl.arange(0, BLOCK)
                for q in range(0, count, BLOCK):
                    o_q = q + tl.arange(0, BLOCK)
                    b = load_tile(p_w, o_q, o_k, count, K, ld, 1)
                    b -= ridge * load_tile(p_n, o_q, o_k, count, K, ld, 1)
                    store_tile(p_w, b, o_q, o_k, count, K, ld, 1)
            tl.debug_barrier()

        # Back through the decoding ẑ = Rᵀ wₙ.
        copy_or_zero(
            p_w_bar, ld, p_grad_weights + i_b * s_wb + o_first * s_wr, s_wr, s_wc, count, K, WITH_WEIGHTS, BLOCK
        )
        if WITH_VALUES:
            p_gv = p_grad_values + i_b * s_vb + o_first * s_vr
            product(p_w_bar, ld, 1, p_gv, s_vr, s_vc, p_mean, s_mc, s_mr, count, K, C, 1.0, True, PRECISION,
                    BLOCK, BLOCK, 16)  # fmt: skip
            product(p_to_mean, C, 1, p_w, 1, ld, p_gv, s_vr, s_vc, K, C, count, 1.0, True, PRECISION,
                    BLOCK, BLOCK, 16)  # fmt: skip

        # Back through the iterations, and last through the address, which is one with v in place of −u.
        for back in range(num_iters):
            n = num_iters - 1 - back
            p_n = p_solutions + tl.cast(n, tl.int64) * ROWS * ld
            scale = tl.where(n == 0, tl.where(good, -1.0, float("nan")), ridge)
            solve(p_u, ld, p_w_bar, ld, p_inverse, p_y, count, K, ld, scale, False, BLOCK)
            product(p_solved, ld, 1, p_u, 1, ld, p_n, ld, 1, K, K, count, 1.0, True, "ieee", BLOCK, BLOCK, 16)
            for k in range(0, K, BLOCK):
                o_k = k + tl.arange(0, BLOCK)
                for q in range(0, count, BLOCK):
                    o_q = q + tl.arange(0, BLOCK)
                    u = load_tile(p_u, o_q, o_k, count, K, ld, 1)
                    b = tl.where(n == 0, -u, load_tile(p_w_bar, o_q, o_k, count, K, ld, 1) - u)
                    store_tile(p_w_bar, b, o_q, o_k, count, K, ld, 1)
            tl.debug_barrier()
            to_ridge -= inner_product(p_w_bar, p_n, count, K, ld, BLOCK)
        if SQUARED:
            product(p_target, ld, 1, p_w_bar, 1, ld, p_x, ld, 1, K, K, count, 1.0, True, "ieee", BLOCK, BLOCK, 16)
            product(p_u, ld, 1, p_w_bar, ld, 1, p_gram, ld, 1, count, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
            p_v = p_u
        else:
            p_v = p_w_bar
        product(p_to_mean, C, 1, p_v, 1, ld, p_z, s_qr, s_qc, K, C, count, 1.0, True, PRECISION, BLOCK, BLOCK, 16)
        product(p_to_queries + (i_b * Q + o_first) * C, C, 1, p_v, ld, 1, p_mean, s_mr, s_mc, count, C, K, 1.0, False,
                PRECISION, BLOCK, BLOCK, 16)  # fmt: skip

    # Back through the Gram matrix; the order of a product's strides says which of Ā and Āᵀ it takes.
    if SQUARED:
        product(p_target, ld, 1, p_solved, ld, 1, p_gram, ld, 1, K, K, K, 1.0, True, "ieee", BLOCK, BLOCK, 16)
        product(p_target, ld, 1, p_gram, ld, 1, p_solved, ld, 1, K, K, K, 1.0, True, "ieee", BLOCK, BLOCK, 16)
        p_gram_bar = p_target
    else:
        p_gram_bar = p_solved
    product(p_to_mean, C, 1, p_gram_bar, ld, 1, p_mean, s_mr, s_mc, K, C, K, 1.0, True, "ieee", BLOCK, BLOCK, 16)
    product(p_to_mean, C, 1, p_gram_bar, 1, ld, p_mean, s_mr, s_mc, K, C, K, 1.0, True, "ieee", BLOCK, BLOCK, 16)
    tl.store(p_to_ridge + i_b, to_ridge.to(tl.float32))


# ----------------------------------------------------------------------------------------------------------- launchers

# Fewer memories than this do not fill a chip, so their queries are spread over it.
FEW_MEMORIES = 256
# Queries of one memory that the backward treats at once.
BACKWARD_ROWS = 64


def run_read(mean, queries, ridge, num_iters, squared_gram, precision, with_values):
    (B, K, C), Q, ld = mean.shape, queries.shape[1], row_stride(mean.shape[1])
    weights, info = mean.new_empty(B, Q, K), mean.new_empty(B, dtype=torch.int32)
    values = mean.new_empty(queries.shape) if with_values else None
    if not B:
        return values, weights, info
    tiles = triton.cdiv(Q, BLOCK)
    split = B < FEW_MEMORIES and tiles > 1
    work = workspace(mean, B, (3 if squared_gram else 2) * K * ld)
    scratch = workspace(mean, B * tiles if split else B, 2 * BLOCK * ld)
    for phase in (True, False) if split else (True,):
        read_kernel[(B if phase else B * tiles,)](
            mean, *mean.stride(), queries, *queries.stride(), ridge, *ridge.stride(),
            values if with_values else weights, weights, info, work, work.stride(0), scratch, scratch.stride(0),
            K, C, Q, ld, num_iters, tiles, FACTOR=phase, SPLIT=split, WITH_VALUES=with_values, SQUARED=squared_gram,
            PRECISION=precision_of(precision), ALIGNED=rows_aligned(mean, queries), **square(K),
        )  # fmt: skip
    return values, weights, info


@implements("read")
def read_launcher(mean, queries, ridge, num_iters, squared_gram, precision):
    return run_read(mean, queries, ridge, num_iters, squared_gram, precision, True)


@implements("solve_addressing")
def solve_addressing_launcher(mean, queries, ridge, squared_gram):
    return run_read(mean, queries, ridge, 1, squared_gram, 0, False)[1:]


@implements("factor_addressing")
def factor_addressing(mean: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    (B, K, C), ld = mean.shape, row_stride(mean.shape[1])
    lower, info = mean.new_empty(B, K, K), mean.new_empty(B, dtype=torch.int32)
    if B:
        work = workspace(mean, B, 2 * K * ld)
        factor_kernel[(B,)](
            mean, *mean.stride(), ridge, *ridge.stride(), lower, info, work, work.stride(0), K, C, ld,
            ALIGNED=rows_aligned(mean), **square(K),
        )  # fmt: skip
    return lower, info


@implements("solve_factored")
def solve_factored(mean: Tensor, factor: Tensor, queries: Tensor) -> Tensor:
    (B, K, C), Q, ld = mean.shape, queries.shape[1], row_stride(mean.shape[1])
    weights, tiles = mean.new_empty(B, Q, K), triton.cdiv(queries.shape[1], BLOCK)
    if weights.numel():
        scratch = workspace(mean, B * tiles, BLOCK * ld + BLOCK * BLOCK + triton.cdiv(K, BLOCK) * BLOCK * BLOCK)
        solve_factored_kernel[(B * tiles,)](
            mean, *mean.stride(), factor, *factor.stride(), queries, *queries.stride(), weights,
            scratch, scratch.stride(0), K, C, Q, ld, tiles,
            ALIGNED=rows_aligned(mean, queries), BLOCK=BLOCK, **warps(4),
        )  # fmt: skip
    return weights


@implements("read_backward")
def read_backward(mean, queries, ridge, num_iters, squared_gram, precision, grad_values, grad_weights):
    (B, K, C), Q, ld = mean.shape, queries.shape[1], row_stride(mean.shape[1])
    to = [mean.new_empty(x.shape) for x in (mean, queries, ridge)]
    if B:
        work = workspace(mean, B, 5 * K * ld + (5 + num_iters) * BACKWARD_ROWS * ld)
        grads = [y for x in (grad_values, grad_weights) for y in (mean if x is None else x, *strides(x, 3))]
        read_backward_kernel[(B,)](
            mean, *mean.stride(), queries, *queries.stride(), ridge, *ridge.stride(), *grads, *to,
            work, work.stride(0), K, C, Q, ld, num_iters,
            WITH_VALUES=grad_values is not None, WITH_WEIGHTS=grad_weights is not None, SQUARED=squared_gram,
            PRECISION=precision_of(precision), ALIGNED=rows_aligned(mean, queries), ROWS=BACKWARD_ROWS, **square(K),
        )  # fmt: skip
    return tuple(to)


_operators = torch.ops.fastkm_triton

read = differentiable(_operators.read.default, _operators.read_backward.default)
solve_addressing = differentiable(
    _operators.solve_addressing.default,
    _operators.read_backward.default,
    # A solve is a read of one iteration whose values nobody took.
    lambda mean, queries, ridge, squared_gram, grad: (mean, queries, ridge, 1, squared_gram, 0, None, grad),
)


attractor_read = without_gradient(
    torch.ops.fastkm_triton.factor_addressing.default, torch.ops.fastkm_triton.solve_factored.default
)
