"""Triton kernels of write.

The weights are found in Gram space: with G = R Rᵀ, X = Z Rᵀ and Q = Z Zᵀ the search lives in K and T, in one program
a memory. As it conditions the covariance on every pattern it finds, it is the factor phase of the update too; what is
left is the apply phase of ``fastkm/posterior/triton.py``. Up to ``LARGEST_TILE`` rows both are one launch, in which the
inverse of G + λI, that matrix and the covariance stay in registers.
"""

import torch
import triton
import triton.language as tl

from fastkm._linalg.triton import (
    BLOCK,
    EPS,
    IS_INDEFINITE,
    copy_or_zero,
    factor,
    fours,
    implements,
    load_symmetric,
    load_tile,
    precision_of,
    product,
    row_stride,
    rows_aligned,
    square,
    store_tile,
    strides,
    warps,
    workspace,
)
from fastkm._runtime.autograd import differentiable
from fastkm.posterior.triton import (
    CHUNK,
    LARGEST_TILE,
    apply_kernel,
    apply_pattern_by_pattern,
    copy_patterns,
    seen_by,
    tell,
    update_posterior_backward,
)
from fastkm.reading.triton import factor_memory

# --------------------------------------------------------------------------------------------------- vectors in memory


@triton.jit
def load_vector(p, o, n):
    return tl.load(p + o, mask=o < n, other=0.0)


@triton.jit
def keep_vector(p, value, o, n):
    """Store a vector that other threads will read."""
    tl.debug_barrier()
    tl.store(p + o, value, mask=o < n)
    tl.debug_barrier()


@triton.jit
def multiply(p_work, p_m, s_row, s_col, x, n, ROWS: tl.constexpr):
    """M x for a vector in registers; by way of ``p_work``, as its rows are spread over the threads otherwise."""
    SIZE: tl.constexpr = x.shape[0]
    o = tl.arange(0, SIZE)
    tl.debug_barrier()
    for i in range(0, n, ROWS):
        o_i = i + tl.arange(0, ROWS)
        y = tl.sum(load_tile(p_m, o_i, o, n, n, s_row, s_col) * x[None, :], 1)
        tl.store(p_work + o_i, y, mask=o_i < n)
    tl.debug_barrier()
    return load_vector(p_work, o, n)


@triton.jit
def solve_vector(p_work, p_inverse, ld, x, n, ROWS: tl.constexpr):
    """A⁻¹ x with A = L Lᵀ."""
    return multiply(p_work, p_inverse, 1, ld, multiply(p_work, p_inverse, ld, 1, x, n, ROWS), n, ROWS)


@triton.jit
def add_symmetric_outer(p_m, ld, scale, p_x, p_y, n, BLOCK: tl.constexpr):
    """M += scale (x yᵀ + y xᵀ) / 2 for two vectors in memory."""
    for i in range(0, n, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        x_i, y_i = load_vector(p_x, o_i, n), load_vector(p_y, o_i, n)
        for j in range(0, n, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            x_j, y_j = load_vector(p_x, o_j, n), load_vector(p_y, o_j, n)
            b = load_tile(p_m, o_i, o_j, n, n, ld, 1)
            b += (0.5 * scale) * (x_i[:, None] * y_j[None, :] + y_i[:, None] * x_j[None, :])
            store_tile(p_m, b, o_i, o_j, n, n, ld, 1)
    tl.debug_barrier()


@triton.jit
def copy_matrix(p_to, p_from, ld, n, BLOCK: tl.constexpr):
    copy_or_zero(p_to, ld, p_from, ld, 1, n, n, True, BLOCK)
    tl.debug_barrier()


@triton.jit
def move_gram(p_gram, ld, p_c, p_r, d, sign, n, BLOCK: tl.constexpr):
    """G += c rᵀ + r cᵀ + d c cᵀ: what R + c δᵀ does to the Gram matrix, where r = R δ and d = δ·δ."""
    add_symmetric_outer(p_gram, ld, 2.0 * sign, p_c, p_r, n, BLOCK)
    add_symmetric_outer(p_gram, ld, d * sign, p_c, p_c, n, BLOCK)


# -------------------------------------------------------------------------------------------------- the search, forward


@triton.jit
def inner_products(
    p_mean, s_mr, s_mc, p_values, s_zt, s_zc, p_mask, s_kt, p_z, p_gram, p_cross, p_inner, K, C, T, ld,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Z with zeros for hidden patterns, G [K, K], X [T, K] and Q [T, T]."""
    copy_patterns(p_z, p_values, s_zt, s_zc, C, p_mask, s_kt, T, MASKED, BLOCK)
    product(p_gram, ld, 1, p_mean, s_mr, s_mc, p_mean, s_mc, s_mr, K, K, C, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_cross, ld, 1, p_z, C, 1, p_mean, s_mc, s_mr, T, K, C, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_inner, T, 1, p_z, C, 1, p_z, 1, C, T, T, C, 1.0, False, "ieee", BLOCK, BLOCK, 16)


@triton.jit
def advance_cross(
    p_cross, p_inner, p_along, t, w, c, K, T, ld, TAPE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """The patterns still to come, after one with weights w moved the mean by c δᵀ:  x ← x + c (δ·z)."""
    o = tl.arange(0, SIZE)
    tl.debug_barrier()
    for i in range(t + 1, T, ROWS):
        o_i = i + tl.arange(0, ROWS)
        x = load_tile(p_cross, o_i, o, T, K, ld, 1)
        along = tl.load(p_inner + o_i.to(tl.int64) * T + t, mask=o_i < T, other=0.0) - tl.sum(x * w[None, :], 1)
        tl.debug_barrier()
        store_tile(p_cross, x + along[:, None] * c[None, :], o_i, o, T, K, ld, 1)
        if TAPE:
            tl.store(p_along + tl.cast(t, tl.int64) * T + o_i, along, mask=o_i < T)
    tl.debug_barrier()


@triton.jit
def search_in_registers(
    p_gram, p_lower, p_inverse, p_cross, p_inner, p_cov, s_ur, s_uc, p_noise, s_nt, ridge,
    p_new_cov, p_weights, p_s, p_gain, p_vectors, K, T, ld,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """One solve a pattern, and no factorisation after the first.

    With w exact, R δ = λ w, so A = G + λI changes by [c w] [[d, λ], [λ, 0]] [c w]ᵀ and its inverse H by Woodbury:
    H −= [p q] N⁻¹ [p q]ᵀ with p = H c, q = H w, N = [[d, λ], [λ, 0]]⁻¹ + [c w]ᵀ H [c w]. What H has lost to rounding,
    one step of refinement against A gives back to w. Expects G + λI in ``p_gram`` and H in ``p_lower``; A and U
    stay in memory unless HOLD says that the registers have room for them beside H.
    """
    o = tl.arange(0, SIZE)
    inverse = load_tile(p_lower, o, o, K, K, ld, 1)
    p_w, p_c, p_product = p_vectors, p_vectors + ld, p_vectors + 2 * ld
    status = load_symmetric(p_new_cov, K, p_cov, s_ur, s_uc, K, BLOCK)
    if HOLD:
        system = load_tile(p_gram, o, o, K, K, ld, 1)
        cov = load_tile(p_new_cov, o, o, K, K, K, 1)
        tl.debug_barrier()
    for t in range(T):
        x = load_vector(p_cross + tl.cast(t, tl.int64) * ld, o, K)
        w = tl.sum(inverse * x[:, None], 0)
        if HOLD:  # noqa: SIM108  decided when the kernel is compiled
            residual = x - tl.sum(system * w[:, None], 0)
        else:
            residual = x - multiply(p_product, p_gram, ld, 1, w, K, ROWS)
        w += tl.sum(inverse * residual[:, None], 0)
        if HOLD:  # noqa: SIM108
            a = tl.sum(cov * w[:, None], 0)
        else:
            a = multiply(p_product, p_new_cov, K, 1, w, K, ROWS)
        noise = tl.load(p_noise + tl.cast(t, tl.int64) * s_nt)
        s = tl.sum(w * a, 0) + noise
        slack = (tl.sum(tl.abs(w * a), 0) + noise) * (4.0 * EPS) * (K + T)
        holds = (s >= noise - slack) & (s < float("inf"))
        status = tl.where((status == 0) & (holds == 0), IS_INDEFINITE, status)
        s = tl.maximum(s, noise)
        c, gain = a / s, a / tl.sqrt(s)
        d = tl.load(p_inner + tl.cast(t, tl.int64) * (T + 1)) - tl.sum(w * x, 0) - ridge * tl.sum(w * w, 0)

        p, q = tl.sum(inverse * c[:, None], 0), tl.sum(inverse * w[:, None], 0)
        n11, n12 = tl.sum(c * p, 0), tl.sum(c * q, 0) + 1 / ridge
        n22 = tl.sum(w * q, 0) - d / (ridge * ridge)
        determinant = n11 * n22 - n12 * n12
        e, f = (n22 * p - n12 * q) / determinant, (n11 * q - n12 * p) / determinant
        inverse -= p[:, None] * e[None, :] + q[:, None] * f[None, :]
        if HOLD:
            along_c = ridge * w + d * c
            system += c[:, None] * along_c[None, :] + (ridge * w)[:, None] * c[None, :]
            cov -= gain[:, None] * gain[None, :]
        else:
            keep_vector(p_w, w, o, K)
            keep_vector(p_c, c, o, K)
            add_symmetric_outer(p_gram, ld, 2 * ridge, p_c, p_w, K, BLOCK)
            add_symmetric_outer(p_gram, ld, d, p_c, p_c, K, BLOCK)
            keep_vector(p_w, gain, o, K)
            add_symmetric_outer(p_new_cov, K, -1.0, p_w, p_w, K, BLOCK)

        tl.store(p_weights + tl.cast(t, tl.int64) * K + o, w, mask=o < K)
        tl.store(p_gain + tl.cast(t, tl.int64) * K + o, gain, mask=o < K)
        tl.store(p_s + t, s)
        advance_cross(p_cross, p_inner, p_cross, t, w, c, K, T, ld, False, SIZE, 16)
    if HOLD:
        store_tile(p_new_cov, cov, o, o, K, K, K, 1)
    tl.debug_barrier()
    return status


@triton.jit
def prepare(
    p_gram, p_c, p_r, d, along, x, p_moved, p_lower, p_inverse, ridge, again, K, ld,
    SQUARED: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Factor what the next attempt solves with, and return its right-hand side before G, x.

    ``again``: the attempt before, R + c δᵀ, has moved both.
    """
    SIZE: tl.constexpr = x.shape[0]
    o = tl.arange(0, SIZE)
    copy_matrix(p_moved, p_gram, ld, K, BLOCK)
    if again:
        move_gram(p_moved, ld, p_c, p_r, d, 1.0, K, BLOCK)
        x += along * load_vector(p_c, o, K)
    if SQUARED:
        product(p_lower, ld, 1, p_moved, ld, 1, p_moved, ld, 1, K, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    else:
        copy_matrix(p_lower, p_moved, ld, K, BLOCK)
    for k in range(0, K, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        at = p_lower + o_k.to(tl.int64) * (ld + 1)
        tl.store(at, tl.load(at, mask=o_k < K, other=0.0) + ridge, mask=o_k < K)
    tl.debug_barrier()
    _, good = factor(p_lower, p_inverse, K, ld, BLOCK, SINGLE)
    return x, good


@triton.jit
def attempt(p_gram, p_cov, p_work, x, w, inner, noise, K, ld, ROWS: tl.constexpr):
    """What weights w would write: a = U w, s, c = a/s, r = R δ = x − G w, δ·z and δ·δ."""
    a = multiply(p_work, p_cov, ld, 1, w, K, ROWS)
    g = multiply(p_work, p_gram, ld, 1, w, K, ROWS)
    s = tl.maximum(tl.sum(w * a, 0) + noise, noise)
    along = inner - tl.sum(w * x, 0)
    d = along - tl.sum(w * x, 0) + tl.sum(w * g, 0)
    return a, s, a / s, x - g, along, d


@triton.jit
def search_afresh(
    p_gram, p_cov, p_cross, p_inner, p_noise, s_nt, ridge, p_moved, p_lower, p_inverse, p_vectors,
    p_weights, p_s, p_gain, K, T, ld, num_opt_iters, status,
    SQUARED: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every solve factors afresh: for the squared-Gram solve, several solves a pattern, and large memories."""
    o = tl.arange(0, SIZE)
    p_c, p_r, p_work = p_vectors, p_vectors + ld, p_vectors + 2 * ld
    p_g = p_work + ld
    for t in range(T):
        x = load_vector(p_cross + tl.cast(t, tl.int64) * ld, o, K)
        inner = tl.load(p_inner + tl.cast(t, tl.int64) * (T + 1))
        noise = tl.load(p_noise + tl.cast(t, tl.int64) * s_nt)
        d, along, s = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
        w, a, c = tl.zeros((SIZE,), tl.float32), tl.zeros((SIZE,), tl.float32), tl.zeros((SIZE,), tl.float32)
        for n in range(num_opt_iters):
            target, good = prepare(p_gram, p_c, p_r, d, along, x, p_moved, p_lower, p_inverse, ridge, n > 0,
                                   K, ld, SQUARED, BLOCK, SINGLE)  # fmt: skip
            status = tl.where((status == 0) & (good == 0), IS_INDEFINITE, status)
            if SQUARED:
                target = multiply(p_work, p_moved, ld, 1, target, K, ROWS)
            w = solve_vector(p_work, p_inverse, ld, target, K, ROWS)
            a, s, c, r, along, d = attempt(p_gram, p_cov, p_work, x, w, inner, noise, K, ld, ROWS)
            holds = (s < float("inf")) & (tl.sum(w * a, 0) >= -tl.sum(tl.abs(w * a), 0) * (4.0 * EPS) * (K + T))
            status = tl.where((status == 0) & (holds == 0), IS_INDEFINITE, status)
            keep_vector(p_c, c, o, K)
            keep_vector(p_r, r, o, K)
        gain = a / tl.sqrt(s)
        move_gram(p_gram, ld, p_c, p_r, d, 1.0, K, BLOCK)
        keep_vector(p_g, gain, o, K)
        add_symmetric_outer(p_cov, ld, -1.0, p_g, p_g, K, BLOCK)
        tl.store(p_weights + tl.cast(t, tl.int64) * K + o, w, mask=o < K)
        tl.store(p_gain + tl.cast(t, tl.int64) * K + o, gain, mask=o < K)
        tl.store(p_s + t, s)
        advance_cross(p_cross, p_inner, p_cross, t, w, c, K, T, ld, False, SIZE, ROWS)
    return status


# Bytes moved: mean, cov, values and noise in, mean, cov, weights, variances and divergences out, once each, and the
# mean and values again from the cache for the apply phase. Working memory: 3 K² + T (2 K + T + C).
@triton.jit
def write_kernel(
    p_mean, s_mb, s_mr, s_mc, p_cov, s_ub, s_ur, s_uc, p_values, s_zb, s_zt, s_zc,
    p_noise, s_nb, s_nt, p_mask, s_kb, s_kt, p_ridge, s_lb,
    p_new_mean, p_new_cov, p_weights, p_s, p_kl, p_log_evidence, p_info, p_gain, p_energy, p_work, s_work,
    K, C, T, ld, tiles, num_opt_iters,
    MASKED: tl.constexpr, ALIGNED: tl.constexpr, AFRESH: tl.constexpr, APPLY: tl.constexpr, SQUARED: tl.constexpr,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Find the weights of every pattern, and, with APPLY, condition the mean on them."""
    C, s_mb, s_mr = fours(C, ALIGNED), fours(s_mb, ALIGNED), fours(s_mr, ALIGNED)
    s_zb, s_zt = fours(s_zb, ALIGNED), fours(s_zt, ALIGNED)
    i_b = tl.program_id(0).to(tl.int64)
    p_mean += i_b * s_mb
    p_cov += i_b * s_ub
    p_values += i_b * s_zb
    p_noise += i_b * s_nb
    p_mask += i_b * s_kb
    p_new_cov += i_b * K * K
    p_weights += i_b * T * K
    p_gain += i_b * T * K
    p_s += i_b * T
    ridge = tl.load(p_ridge + i_b * s_lb)
    p_gram = p_work + i_b * s_work
    p_lower = p_gram + K * ld
    p_inverse = p_lower + K * ld
    p_cross = p_inverse + K * ld
    p_inner = p_cross + T * ld
    p_z = p_inner + T * T
    p_moved = p_z + T * C  # the rest, but for three vectors, only where every solve factors afresh
    p_row_cov = p_moved + K * ld
    p_vectors = p_row_cov + K * ld
    inner_products(p_mean, s_mr, s_mc, p_values, s_zt, s_zc, p_mask, s_kt, p_z, p_gram, p_cross, p_inner,
                   K, C, T, ld, MASKED, BLOCK)  # fmt: skip
    if AFRESH:
        status = load_symmetric(p_row_cov, ld, p_cov, s_ur, s_uc, K, BLOCK)
        status = search_afresh(
            p_gram, p_row_cov, p_cross, p_inner, p_noise, s_nt, ridge, p_moved, p_lower, p_inverse, p_vectors,
            p_weights, p_s, p_gain, K, T, ld, num_opt_iters, status, SQUARED, BLOCK, SINGLE, SIZE, ROWS,
        )  # fmt: skip
        copy_or_zero(p_new_cov, K, p_row_cov, ld, 1, K, K, True, BLOCK)
    else:
        # H = A⁻¹ = L⁻ᵀ L⁻¹ in the place of L, and A itself.
        good = factor_memory(p_mean, s_mr, s_mc, ridge, p_lower, p_inverse, p_gram, K, C, ld, False, BLOCK, SINGLE)
        product(p_lower, ld, 1, p_inverse, 1, ld, p_inverse, ld, 1, K, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
        for k in range(0, K, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            at = p_gram + o_k.to(tl.int64) * (ld + 1)
            tl.store(at, tl.load(at, mask=o_k < K, other=0.0) + ridge, mask=o_k < K)
        tl.debug_barrier()
        status = search_in_registers(
            p_gram, p_lower, p_inverse, p_cross, p_inner, p_cov, s_ur, s_uc, p_noise, s_nt, ridge,
            p_new_cov, p_weights, p_s, p_gain, p_moved, K, T, ld, BLOCK, SIZE, ROWS, SIZE <= 64,
        )  # fmt: skip
        status = tl.where((status == 0) & (good == 0), IS_INDEFINITE, status)
    tl.store(p_info + i_b, status)
    if APPLY:
        p_energy += i_b * tiles * T
        tl.debug_barrier()
        for j in range(tiles):
            apply_pattern_by_pattern(
                p_mean, s_mr, s_mc, p_weights, K, 1, p_values, s_zt, s_zc, p_mask, s_kt, p_new_mean + i_b * K * C,
                p_s, p_gain, p_energy + j * T, j * BLOCK, K, C, T, MASKED, SIZE, BLOCK, CHUNK,
            )  # fmt: skip
        tl.debug_barrier()
        tell(p_s, p_energy, tiles, p_kl + i_b * T, p_log_evidence + i_b, p_noise, s_nt, p_mask, s_kt, T, C,
             MASKED, CHUNK)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit
def retreat_cross(
    p_cross, p_cross_bar, p_inner_bar, p_along, t, w, c, w_bar, c_bar, K, T, ld, SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """Undo ``advance_cross``, and gather what the patterns after t say of w and c."""
    o = tl.arange(0, SIZE)
    tl.debug_barrier()
    for i in range(t + 1, T, ROWS):
        o_i = i + tl.arange(0, ROWS)
        along = tl.load(p_along + tl.cast(t, tl.int64) * T + o_i, mask=o_i < T, other=0.0)
        x = load_tile(p_cross, o_i, o, T, K, ld, 1) - along[:, None] * c[None, :]
        x_bar = load_tile(p_cross_bar, o_i, o, T, K, ld, 1)
        of_along = tl.sum(x_bar * c[None, :], 1)
        c_bar += tl.sum(along[:, None] * x_bar, 0)
        w_bar -= tl.sum(of_along[:, None] * x, 0)
        at = p_inner_bar + o_i.to(tl.int64) * T + t
        before = tl.load(at, mask=o_i < T, other=0.0)
        tl.debug_barrier()
        tl.store(at, before + of_along, mask=o_i < T)
        store_tile(p_cross, x, o_i, o, T, K, ld, 1)
        store_tile(p_cross_bar, x_bar - of_along[:, None] * w[None, :], o_i, o, T, K, ld, 1)
    tl.debug_barrier()
    return w_bar, c_bar


# Bytes moved: at least the inputs of the search and the cotangent of its weights in, and the gradients in and out, each
# once; states, tape and cotangents are working memory, 8 K² + T (6 K + 2 T + C) numbers a memory.
@triton.jit
def search_backward_kernel(
    p_mean, s_mb, s_mr, s_mc, p_cov, s_ub, s_ur, s_uc, p_values, s_zb, s_zt, s_zc,
    p_noise, s_nb, s_nt, p_mask, s_kb, s_kt, p_ridge, s_lb, p_weights, s_wb, s_wt, s_wk,
    p_weights_bar, p_grad_weights, s_gb, s_gt, s_gk,
    p_to_mean, p_to_cov, p_to_values, p_to_noise, p_to_ridge, p_work, s_work, K, C, T, ld, num_opt_iters,
    MASKED: tl.constexpr, WITH_WEIGHTS: tl.constexpr, SQUARED: tl.constexpr,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Undo the search pattern by pattern in K and T; the cotangents of G, X and Q become those of the codes at the end.

    Adds to gradients that already hold what comes through the update with these weights.
    """
    i_b = tl.program_id(0).to(tl.int64)
    p_mean += i_b * s_mb
    p_noise += i_b * s_nb
    p_mask += i_b * s_kb
    p_weights += i_b * s_wb
    p_weights_bar += i_b * T * K
    p_to_mean += i_b * K * C
    p_to_cov += i_b * K * K
    p_to_values += i_b * T * C
    p_to_noise += i_b * T
    ridge = tl.load(p_ridge + i_b * s_lb)
    p_gram = p_work + i_b * s_work
    p_lower = p_gram + K * ld
    p_inverse = p_lower + K * ld
    p_moved = p_inverse + K * ld
    p_row_cov = p_moved + K * ld
    p_gram_bar = p_row_cov + K * ld
    p_cov_bar = p_gram_bar + K * ld
    p_moved_bar = p_cov_bar + K * ld
    p_cross = p_moved_bar + K * ld
    p_cross_bar = p_cross + T * ld
    p_a = p_cross_bar + T * ld  # a, c, r and (d) of the attempt that was written
    p_c = p_a + T * ld
    p_r = p_c + T * ld
    p_inner = p_r + T * ld
    p_inner_bar = p_inner + T * T
    p_along = p_inner_bar + T * T
    p_d = p_along + T * T
    p_z = p_d + T
    p_vectors = p_z + T * C
    p_made = p_vectors + 8 * ld  # w, c, r of every attempt at one pattern, then its s, δ·z and δ·δ
    p_x1, p_x2, p_x3, p_x4 = p_vectors, p_vectors + ld, p_vectors + 2 * ld, p_vectors + 3 * ld
    p_vector = p_vectors + 4 * ld
    o = tl.arange(0, SIZE)
    inner_products(p_mean, s_mr, s_mc, p_values + i_b * s_zb, s_zt, s_zc, p_mask, s_kt, p_z, p_gram, p_cross, p_inner,
                   K, C, T, ld, MASKED, BLOCK)  # fmt: skip
    copy_or_zero(p_row_cov, ld, p_cov + i_b * s_ub, s_ur, s_uc, K, K, True, BLOCK)
    copy_or_zero(p_gram_bar, ld, p_gram, ld, 1, K, K, False, BLOCK)
    copy_or_zero(p_cov_bar, ld, p_gram, ld, 1, K, K, False, BLOCK)
    copy_or_zero(p_cross_bar, ld, p_gram, ld, 1, T, K, False, BLOCK)
    copy_or_zero(p_inner_bar, T, p_gram, T, 1, T, T, False, BLOCK)
    tl.debug_barrier()

    # Write again with the weights that were found.
    for t in range(T):
        row = tl.cast(t, tl.int64) * ld
        x = load_vector(p_cross + row, o, K)
        w = tl.load(p_weights + tl.cast(t, tl.int64) * s_wt + o * s_wk, mask=o < K, other=0.0)
        noise = tl.load(p_noise + tl.cast(t, tl.int64) * s_nt)
        inner = tl.load(p_inner + tl.cast(t, tl.int64) * (T + 1))
        a, s, c, r, along, d = attempt(p_gram, p_row_cov, p_vector, x, w, inner, noise, K, ld, ROWS)
        tl.store(p_d + t, d)
        keep_vector(p_a + row, a, o, K)
        keep_vector(p_c + row, c, o, K)
        keep_vector(p_r + row, r, o, K)
        move_gram(p_gram, ld, p_c + row, p_r + row, d, 1.0, K, BLOCK)
        add_symmetric_outer(p_row_cov, ld, -1.0, p_a + row, p_c + row, K, BLOCK)
        advance_cross(p_cross, p_inner, p_along, t, w, c, K, T, ld, True, SIZE, ROWS)

    to_ridge = tl.full((), 0, tl.float32)
    for back in range(T):
        t = T - 1 - back
        row = tl.cast(t, tl.int64) * ld
        seen = tl.sum(seen_by(p_mask, s_kt, t + tl.arange(0, 1), T, MASKED).to(tl.int32), 0)
        if seen > 0:
            noise = tl.load(p_noise + tl.cast(t, tl.int64) * s_nt)
            inner = tl.load(p_inner + tl.cast(t, tl.int64) * (T + 1))
            # The state before the pattern, and its attempts.
            d = tl.load(p_d + t)
            move_gram(p_gram, ld, p_c + row, p_r + row, d, -1.0, K, BLOCK)
            add_symmetric_outer(p_row_cov, ld, 1.0, p_a + row, p_c + row, K, BLOCK)
            x = load_vector(p_cross + row, o, K)
            w = tl.load(p_weights + tl.cast(t, tl.int64) * s_wt + o * s_wk, mask=o < K, other=0.0)
            along = tl.full((), 0, tl.float32)
            moved_d = tl.full((), 0, tl.float32)
            for n in range(num_opt_iters):
                if n + 1 < num_opt_iters:
                    p_before = p_made + (n - 1) * (3 * ld + 16)
                    target, _ = prepare(p_gram, p_before + ld, p_before + 2 * ld, moved_d, along, x, p_moved,
                                        p_lower, p_inverse, ridge, n > 0, K, ld, SQUARED, BLOCK, SINGLE)  # fmt: skip
                    if SQUARED:
                        target = multiply(p_vector, p_moved, ld, 1, target, K, ROWS)
                    tried = solve_vector(p_vector, p_inverse, ld, target, K, ROWS)
                else:
                    tried = w
                a, s, c, r, along, moved_d = attempt(p_gram, p_row_cov, p_vector, x, tried, inner, noise, K, ld, ROWS)
                p_now = p_made + n * (3 * ld + 16)
                keep_vector(p_now, tried, o, K)
                keep_vector(p_now + ld, c, o, K)
                keep_vector(p_now + 2 * ld, r, o, K)
                tl.store(p_now + 3 * ld, s)
                tl.store(p_now + 3 * ld + 1, along)
                tl.store(p_now + 3 * ld + 2, moved_d)
            tl.debug_barrier()

            # Through what the last attempt wrote: G' = G + c rᵀ + r cᵀ + d c cᵀ, U' = U − a cᵀ, and X.
            p_now = p_made + (num_opt_iters - 1) * (3 * ld + 16)
            c, r = load_vector(p_now + ld, o, K), load_vector(p_now + 2 * ld, o, K)
            s = tl.load(p_now + 3 * ld)
            gram_c = multiply(p_vector, p_gram_bar, ld, 1, c, K, ROWS)
            gram_r = multiply(p_vector, p_gram_bar, ld, 1, r, K, ROWS)
            cov_c = multiply(p_vector, p_cov_bar, ld, 1, c, K, ROWS)
            w_bar = load_vector(p_weights_bar + tl.cast(t, tl.int64) * K, o, K)
            if WITH_WEIGHTS:
                at = p_grad_weights + i_b * s_gb + tl.cast(t, tl.int64) * s_gt + o * s_gk
                w_bar += tl.load(at, mask=o < K, other=0.0)
            d_bar = tl.sum(c * gram_c, 0)
            c_bar = 2 * gram_r + 2 * d * gram_c - s * cov_c
            r_bar = 2 * gram_c
            a_bar = -cov_c
            w_bar, c_bar = retreat_cross(p_cross, p_cross_bar, p_inner_bar, p_along, t, w, c, w_bar, c_bar, K, T, ld,
                                         SIZE, ROWS)  # fmt: skip
            along_bar = tl.full((), 0, tl.float32)
            x_bar = load_vector(p_cross_bar + row, o, K)
            inner_bar = tl.load(p_inner_bar + tl.cast(t, tl.int64) * (T + 1))
            noise_bar = tl.load(p_to_noise + t)

            # Through the attempts.
            for step in range(num_opt_iters):
                n = num_opt_iters - 1 - step
                p_now = p_made + n * (3 * ld + 16)
                p_before = p_now - (3 * ld + 16)
                w, c, r = load_vector(p_now, o, K), load_vector(p_now + ld, o, K), load_vector(p_now + 2 * ld, o, K)
                s = tl.load(p_now + 3 * ld)
                # d = δ·z − w·x + w·g,  δ·z = Q_tt − w·x,  r = x − g,  g = G w
                along_bar += d_bar
                inner_bar += along_bar
                g_bar = d_bar * w - r_bar
                w_bar += -d_bar * r - along_bar * x
                x_bar += r_bar - (d_bar + along_bar) * w
                w_bar += multiply(p_vector, p_gram, ld, 1, g_bar, K, ROWS)
                keep_vector(p_x1, g_bar, o, K)
                add_symmetric_outer(p_gram_bar, ld, 1.0, p_x1, p_now, K, BLOCK)
                # c = a/s,  s = w·a + σ²,  a = U w
                s_bar = -tl.sum(c_bar * c, 0) / s
                noise_bar += s_bar
                a_bar += c_bar / s + s_bar * w
                w_bar += s * s_bar * c + multiply(p_vector, p_row_cov, ld, 1, a_bar, K, ROWS)
                keep_vector(p_x1, a_bar, o, K)
                add_symmetric_outer(p_cov_bar, ld, 1.0, p_x1, p_now, K, BLOCK)
                # (G + λI) w = x, or (G² + λI) w = G x, with the G and x that the attempt before left.
                before_along, before_d = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
                if n > 0:
                    before_along, before_d = tl.load(p_before + 3 * ld + 1), tl.load(p_before + 3 * ld + 2)
                target, good = prepare(p_gram, p_before + ld, p_before + 2 * ld, before_d, before_along, x, p_moved,
                                       p_lower, p_inverse, ridge, n > 0, K, ld, SQUARED, BLOCK, SINGLE)  # fmt: skip
                v = solve_vector(p_vector, p_inverse, ld, w_bar, K, ROWS)
                v = tl.where(good, v, float("nan"))
                to_ridge -= tl.sum(v * w, 0)
                copy_or_zero(p_moved_bar, ld, p_gram, ld, 1, K, K, False, BLOCK)
                keep_vector(p_x1, v, o, K)
                if SQUARED:
                    gram_v = multiply(p_vector, p_moved, ld, 1, v, K, ROWS)
                    gram_w = multiply(p_vector, p_moved, ld, 1, w, K, ROWS)
                    keep_vector(p_x2, gram_v, o, K)
                    keep_vector(p_x3, gram_w, o, K)
                    keep_vector(p_x4, target, o, K)
                    add_symmetric_outer(p_moved_bar, ld, -1.0, p_x1, p_x3, K, BLOCK)
                    add_symmetric_outer(p_moved_bar, ld, -1.0, p_x2, p_now, K, BLOCK)
                    add_symmetric_outer(p_moved_bar, ld, 1.0, p_x1, p_x4, K, BLOCK)
                    target_bar = gram_v
                else:
                    add_symmetric_outer(p_moved_bar, ld, -1.0, p_x1, p_now, K, BLOCK)
                    target_bar = v
                add_matrix(p_gram_bar, p_moved_bar, ld, K, BLOCK)
                x_bar += target_bar
                # To the attempt before, which moved G and x.
                if n > 0:
                    c, r = load_vector(p_before + ld, o, K), load_vector(p_before + 2 * ld, o, K)
                    gram_c = multiply(p_vector, p_moved_bar, ld, 1, c, K, ROWS)
                    gram_r = multiply(p_vector, p_moved_bar, ld, 1, r, K, ROWS)
                    d_bar = tl.sum(c * gram_c, 0)
                    c_bar = 2 * gram_r + 2 * before_d * gram_c + before_along * target_bar
                    r_bar = 2 * gram_c
                    along_bar = tl.sum(c * target_bar, 0)
                    w_bar, a_bar = tl.zeros((SIZE,), tl.float32), tl.zeros((SIZE,), tl.float32)
            keep_vector(p_cross_bar + row, x_bar, o, K)
            tl.store(p_inner_bar + tl.cast(t, tl.int64) * (T + 1), inner_bar)
            tl.store(p_to_noise + t, noise_bar)
            tl.debug_barrier()

    # From the cotangents of G, X and Q to those of the codes; Q̄ stands in its lower triangle.
    product(p_to_mean, C, 1, p_gram_bar, ld, 1, p_mean, s_mr, s_mc, K, C, K, 2.0, True, "ieee", BLOCK, BLOCK, 16)
    product(p_to_mean, C, 1, p_cross_bar, 1, ld, p_z, C, 1, K, C, T, 1.0, True, "ieee", BLOCK, BLOCK, 16)
    product(p_to_values, C, 1, p_cross_bar, ld, 1, p_mean, s_mr, s_mc, T, C, K, 1.0, True, "ieee", BLOCK, BLOCK, 16)
    product(p_to_values, C, 1, p_inner_bar, T, 1, p_z, C, 1, T, C, T, 1.0, True, "ieee", BLOCK, BLOCK, 16)
    product(p_to_values, C, 1, p_inner_bar, 1, T, p_z, C, 1, T, C, T, 1.0, True, "ieee", BLOCK, BLOCK, 16)
    for i in range(0, K, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, K, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            b = load_tile(p_to_cov, o_i, o_j, K, K, K, 1) + load_tile(p_cov_bar, o_i, o_j, K, K, ld, 1)
            store_tile(p_to_cov, b, o_i, o_j, K, K, K, 1)
    tl.store(p_to_ridge + i_b, to_ridge)


@triton.jit
def add_matrix(p_to, p_from, ld, n, BLOCK: tl.constexpr):
    for i in range(0, n, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, n, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            b = load_tile(p_to, o_i, o_j, n, n, ld, 1) + load_tile(p_from, o_i, o_j, n, n, ld, 1)
            store_tile(p_to, b, o_i, o_j, n, n, ld, 1)
    tl.debug_barrier()


# ----------------------------------------------------------------------------------------------------------- launchers


def in_registers(rows: int, num_opt_iters: int, squared_gram: bool) -> bool:
    return rows <= LARGEST_TILE and num_opt_iters == 1 and not squared_gram


def sizes(rows: int) -> dict[str, int]:
    """A vector of ``rows``, and the rows of a matrix that are multiplied with it at once."""
    size = max(16, triton.next_power_of_2(rows))
    return {"SIZE": size, "ROWS": min(16, 2048 // size)}


def search_warps(rows: int) -> dict[str, int]:
    return warps(4 if rows <= 32 else 8, 255)


@implements("write")
def write_launcher(mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, precision):
    (B, K, C), T, ld = mean.shape, values.shape[1], row_stride(mean.shape[1])
    rounding = precision_of(precision)
    new_mean, new_cov = mean.new_empty(mean.shape), mean.new_empty(cov.shape)
    weights, s, kl = mean.new_empty(B, T, K), mean.new_empty(B, T), mean.new_empty(B, T)
    log_evidence, info = mean.new_empty(B), mean.new_empty(B, dtype=torch.int32)
    outputs = new_mean, new_cov, weights, s, kl, info
    if not B:
        return outputs
    afresh = not in_registers(K, num_opt_iters, squared_gram)
    fused = K <= LARGEST_TILE and rounding == "ieee"
    tiles = max(1, triton.cdiv(C, BLOCK))
    energy, gain = mean.new_empty(B, tiles, T), mean.new_empty(B, T, K)
    work = workspace(mean, B, (5 if afresh else 3) * K * ld + T * (ld + T + C) + 4 * ld)
    seen = (noise_var if mask is None else mask.view(torch.uint8), *strides(mask, 2))
    of_mean, of_values, noise = (mean, *mean.stride()), (values, *values.stride()), (noise_var, *noise_var.stride())
    shared = {"MASKED": mask is not None, "ALIGNED": rows_aligned(mean, values), "CHUNK": CHUNK}
    write_kernel[(B,)](
        *of_mean, cov, *cov.stride(), *of_values, *noise, *seen, ridge, *ridge.stride(),
        new_mean, new_cov, weights, s, kl, log_evidence, info, gain, energy, work, work.stride(0),
        K, C, T, ld, tiles, num_opt_iters, AFRESH=afresh, APPLY=fused, SQUARED=squared_gram,
        **shared, **sizes(K), **{**square(K), **search_warps(K)},
    )  # fmt: skip
    if not fused:
        ticket = torch.zeros(B, dtype=torch.int32, device=mean.device)
        apply_kernel[(B * tiles,)](
            *of_mean, weights, *weights.stride(), *of_values, *noise, *seen, new_mean, s, kl, log_evidence,
            gain, energy, ticket, K, C, T, tiles,
            PRECISION=rounding, BLOCK_K=BLOCK, BLOCK_C=BLOCK, **warps(4), **shared,
        )  # fmt: skip
    return outputs


@implements("write_backward")
def write_backward(
    mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, precision, weights,
    grad_mean, grad_cov, grad_weights, grad_innovation_var, grad_kl,
):  # fmt: skip
    """Through the update with the weights that were found, then through the search that found them."""
    (B, K, C), T, ld = mean.shape, values.shape[1], row_stride(mean.shape[1])
    to_mean, to_cov, to_weights, to_values, to_noise = update_posterior_backward(
        mean, cov, weights, values, noise_var, mask, precision, grad_mean, grad_cov, grad_innovation_var, grad_kl, None
    )
    to_ridge = mean.new_empty(B)
    if B:
        size = 8 * K * ld + T * (5 * ld + 3 * T + 1 + C) + 8 * ld + num_opt_iters * (3 * ld + 16)
        work = workspace(mean, B, size)
        seen = (noise_var if mask is None else mask.view(torch.uint8), *strides(mask, 2))
        inputs = [y for x in (mean, cov, values, noise_var) for y in (x, *x.stride())]
        search_backward_kernel[(B,)](
            *inputs, *seen, ridge, *ridge.stride(), weights, *weights.stride(),
            to_weights, weights if grad_weights is None else grad_weights, *strides(grad_weights, 3),
            to_mean, to_cov, to_values, to_noise, to_ridge, work, work.stride(0), K, C, T, ld, num_opt_iters,
            MASKED=mask is not None, WITH_WEIGHTS=grad_weights is not None, SQUARED=squared_gram,
            **{**square(K), **search_warps(K)}, **sizes(K),
        )  # fmt: skip
    return to_mean, to_cov, to_values, to_noise, to_ridge


_operators = torch.ops.fastkm_triton

write = differentiable(
    _operators.write.default,
    _operators.write_backward.default,
    keep=slice(2, 3),  # the weights it found
)
