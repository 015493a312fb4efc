"""Triton kernels of update_posterior.

Up to ``LARGEST_TILE`` rows a memory is computed where it is held: its covariance, and then one tile of its mean after
the other, stay in registers while the patterns pass by one at a time. That is one launch with a program a memory, or,
for few memories, a factor phase and an apply phase parallel over tiles of C. Larger memories, and products that may use
tensor cores, take the block form with chunks of 16 patterns, in the same two phases.

Both phases speak of ``G = L⁻¹ W U [T, K]`` and ``E = L⁻¹ (Z − W R) [T, C]``:  R' = R + GᵀE,  U' = U − GᵀG.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkm._linalg.triton import (
    BLOCK,
    EPS,
    IS_ASYMMETRIC,
    IS_INDEFINITE,
    SQRT_EPS,
    copy_or_zero,
    diagonal,
    eliminate,
    factor,
    fill_both_triangles,
    fours,
    implements,
    inverse_of_factor,
    invert_lower,
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

CHUNK = 16
TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def seen_by(p_mask, s_mt, o_t, T, MASKED: tl.constexpr):
    """Whether each pattern is one of those to be written."""
    inside = o_t < T
    if MASKED:
        inside = inside & (tl.load(p_mask + o_t.to(tl.int64) * s_mt, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_patterns(p, o_t, o, seen, size, s_t, s):
    """Rows ``o_t`` of weights or values, zero where a pattern is hidden: it may hold anything, even NaN."""
    m = seen[:, None] & (o < size)[None, :]
    at = p + o_t.to(tl.int64)[:, None] * s_t + o.to(tl.int64)[None, :] * s
    return tl.load(at, mask=m, other=0.0).to(tl.float32)


@triton.jit
def tell(p_s, p_energy, tiles, p_kl, p_log_evidence, p_noise, s_nt, p_mask, s_mt, T, C,
         MASKED: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """From the innovation variances and the energies ‖E_t‖² [tiles, T] to what is told of each pattern.

    KL_t = ½ [C (ln(s/σ²) − β) + β ‖E_t‖²] with β = 1 − σ²/s.
    """
    log_evidence = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, T, CHUNK):
        o_t = first + tl.arange(0, CHUNK)
        m_t = o_t < T
        seen = seen_by(p_mask, s_mt, o_t, T, MASKED)
        noise = tl.load(p_noise + o_t.to(tl.int64) * s_nt, mask=m_t, other=1.0)
        s = tl.load(p_s + o_t, mask=m_t, other=1.0)
        energy = tl.zeros((CHUNK,), tl.float32)
        for i in range(tiles):
            # Past the first-level cache, where another program's store would not be seen.
            energy += tl.load(p_energy + i * T + o_t, mask=m_t, other=0.0, cache_modifier=".cg")
        beta = 1 - noise / s
        tl.store(p_kl + o_t, 0.5 * (C * (tl.log(s / noise) - beta) + beta * energy), mask=m_t)
        log_evidence -= tl.where(seen, 0.5 * (C * tl.log(s * TWO_PI) + energy), 0.0)
    tl.store(p_log_evidence, tl.sum(log_evidence, 0))


# ------------------------------------------------------------------------------------------------------- in registers


@triton.jit
def factor_pattern_by_pattern(
    p_cov, s_ur, s_uc, p_weights, s_wt, s_wk, p_noise, s_nt, p_mask, s_mt,
    p_new_cov, p_s, p_gain, K, T, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """U through all patterns:  a = U w,  s = wᵀa + σ²,  g = a/√s,  U ← U − g gᵀ."""
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < K
    cov = load_tile(p_cov, o_k, o_k, K, K, s_ur, s_uc)
    mirrored = load_tile(p_cov, o_k, o_k, K, K, s_uc, s_ur)
    gap, scale = tl.max(tl.abs(cov - mirrored)), tl.max(tl.abs(cov))
    finite = tl.min((tl.abs(cov) < float("inf")).to(tl.int32))
    status = tl.where(finite == 0, IS_INDEFINITE, tl.where(gap > scale * SQRT_EPS, IS_ASYMMETRIC, 0))
    for t in range(T):
        o_t = t + tl.arange(0, 1)
        seen = seen_by(p_mask, s_mt, o_t, T, MASKED)
        w = tl.sum(load_patterns(p_weights, o_t, o_k, seen, K, s_wt, s_wk), 0)
        noise = tl.load(p_noise + tl.cast(t, tl.int64) * s_nt)
        a = tl.sum(cov * w[:, None], 0)
        s = tl.sum(w * a, 0) + noise
        slack = (tl.sum(tl.abs(w * a), 0) + noise) * (4.0 * EPS) * (K + T)
        holds = (s >= noise - slack) & (s < float("inf"))
        status = tl.where((status == 0) & (holds == 0), IS_INDEFINITE, status)
        s = tl.maximum(s, noise)
        gain = a / tl.sqrt(s)
        cov -= gain[:, None] * gain[None, :]
        tl.store(p_s + t, s)
        tl.store(p_gain + tl.cast(t, tl.int64) * K + o_k, gain, mask=m_k)
    store_tile(p_new_cov, cov, o_k, o_k, K, K, K, 1)
    tl.debug_barrier()
    return status


@triton.jit
def apply_pattern_by_pattern(
    p_mean, s_mr, s_mc, p_weights, s_wt, s_wk, p_values, s_zt, s_zc, p_mask, s_mt,
    p_new_mean, p_s, p_gain, p_energy, c, K, C, T,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Columns from ``c`` on of R through all patterns:  e = (z − Rᵀw)/√s,  R ← R + g eᵀ."""
    o_k, o_c = tl.arange(0, BLOCK), c + tl.arange(0, BLOCK_C)
    o_e = tl.arange(0, CHUNK)
    mean = load_tile(p_mean, o_k, o_c, K, C, s_mr, s_mc)
    for first in range(0, T, CHUNK):
        energy = tl.zeros((CHUNK,), tl.float32)
        for t in range(first, tl.minimum(first + CHUNK, T)):
            o_t = t + tl.arange(0, 1)
            seen = seen_by(p_mask, s_mt, o_t, T, MASKED)
            w = tl.sum(load_patterns(p_weights, o_t, o_k, seen, K, s_wt, s_wk), 0)
            z = tl.sum(load_patterns(p_values, o_t, o_c, seen, C, s_zt, s_zc), 0)
            gain = tl.load(p_gain + tl.cast(t, tl.int64) * K + o_k, mask=o_k < K, other=0.0)
            error = (z - tl.sum(mean * w[:, None], 0)) / tl.sqrt(tl.load(p_s + t))
            mean += gain[:, None] * error[None, :]
            energy = tl.where(o_e == t - first, tl.sum(error * error, 0), energy)
        tl.store(p_energy + first + o_e, energy, mask=first + o_e < T)
    store_tile(p_new_mean, mean, o_k, o_c, K, C, C, 1)


# Bytes moved: mean and cov in and out once, weights, values and noise in once; T (K + tiles) of working memory, and the
# weights and gains again from the cache for every tile of C.
@triton.jit
def update_kernel(
    p_mean, s_mb, s_mr, s_mc, p_cov, s_ub, s_ur, s_uc, p_weights, s_wb, s_wt, s_wk, p_values, s_zb, s_zt, s_zc,
    p_noise, s_nb, s_nt, p_mask, s_kb, s_kt, p_new_mean, p_new_cov, p_s, p_kl, p_log_evidence, p_info,
    p_gain, p_energy, p_ticket, K, C, T, tiles,
    MASKED: tl.constexpr, FACTOR: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The whole update of a memory; SPLIT: its factor phase only, or with FACTOR off one tile of its apply phase."""
    C, s_mb, s_mr = fours(C, ALIGNED), fours(s_mb, ALIGNED), fours(s_mr, ALIGNED)
    s_zb, s_zt = fours(s_zb, ALIGNED), fours(s_zt, ALIGNED)
    i = tl.program_id(0)
    i_tile = 0
    if SPLIT and not FACTOR:
        i_tile = i % tiles
        i = i // tiles
    i_b = i.to(tl.int64)
    p_weights += i_b * s_wb
    p_noise += i_b * s_nb
    p_mask += i_b * s_kb
    p_s += i_b * T
    p_gain += i_b * T * K
    if FACTOR:
        status = factor_pattern_by_pattern(
            p_cov + i_b * s_ub, s_ur, s_uc, p_weights, s_wt, s_wk, p_noise, s_nt, p_mask, s_kt,
            p_new_cov + i_b * K * K, p_s, p_gain, K, T, MASKED, BLOCK,
        )  # fmt: skip
        tl.store(p_info + i_b, status)
    if not (SPLIT and FACTOR):
        p_energy += i_b * tiles * T
        last = i_tile + 1 if SPLIT else tiles
        for j in range(i_tile, last):
            apply_pattern_by_pattern(
                p_mean + i_b * s_mb, s_mr, s_mc, p_weights, s_wt, s_wk, p_values + i_b * s_zb, s_zt, s_zc, p_mask, s_kt,
                p_new_mean + i_b * K * C, p_s, p_gain, p_energy + j * T, j * BLOCK_C, K, C, T,
                MASKED, BLOCK, BLOCK_C, CHUNK,
            )  # fmt: skip
        tl.debug_barrier()
        done = True
        if SPLIT:
            done = tl.atomic_add(p_ticket + i_b, 1, sem="acq_rel") == tiles - 1
        if done:
            tell(p_s, p_energy, tiles, p_kl + i_b * T, p_log_evidence + i_b, p_noise, s_nt, p_mask, s_kt, T, C,
                 MASKED, CHUNK)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- block form


# Bytes moved: cov in and out once a chunk of patterns, which stays in the cache while K² does; weights in once.
@triton.jit
def factor_kernel(
    p_cov, s_ub, s_ur, s_uc, p_weights, s_wb, s_wt, s_wk, p_noise, s_nb, s_nt, p_mask, s_kb, s_kt,
    p_new_cov, p_s, p_info, p_gain, K, T,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Chunk by chunk:  V = W U,  S = V Wᵀ + diag σ² = L Lᵀ,  G = L⁻¹ V,  U ← U − GᵀG."""
    i_b = tl.program_id(0).to(tl.int64)
    p_cov += i_b * s_ub
    p_weights += i_b * s_wb
    p_noise += i_b * s_nb
    p_mask += i_b * s_kb
    p_new_cov += i_b * K * K
    p_s += i_b * T
    p_gain += i_b * T * K
    status = load_symmetric(p_new_cov, K, p_cov, s_ur, s_uc, K, BLOCK)
    o = tl.arange(0, CHUNK)
    for first in range(0, T, CHUNK):
        o_t = first + o
        m_t = o_t < T
        seen = seen_by(p_mask, s_kt, o_t, T, MASKED)
        noise = tl.load(p_noise + o_t.to(tl.int64) * s_nt, mask=m_t, other=1.0)
        p_g = p_gain + tl.cast(first, tl.int64) * K

        # V, kept where G will be, and S.
        predictive = tl.where(o[:, None] == o[None, :], noise[:, None], 0.0)
        for k in range(0, K, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            projected = tl.zeros((CHUNK, BLOCK), tl.float32)
            for j in range(0, K, CHUNK):
                o_j = j + tl.arange(0, CHUNK)
                b_weights = load_patterns(p_weights, o_t, o_j, seen, K, s_wt, s_wk)
                b_cov = load_tile(p_new_cov, o_j, o_k, K, K, K, 1)
                projected = tl.dot(b_weights, b_cov, projected, input_precision="ieee")
            store_tile(p_g, projected, o, o_k, T - first, K, K, 1)
        tl.debug_barrier()
        for k in range(0, K, CHUNK):
            o_k = k + tl.arange(0, CHUNK)
            b_weights = load_patterns(p_weights, o_t, o_k, seen, K, s_wt, s_wk)
            b_projected = load_tile(p_g, o, o_k, T - first, K, K, 1)
            predictive = tl.dot(b_projected, tl.trans(b_weights), predictive, input_precision="ieee")

        # L⁻¹. A positive definite U never lets a pivot fall below σ².
        count = tl.minimum(CHUNK, T - first)
        slack = tl.abs(diagonal(predictive, o)) * (4.0 * EPS) * (K + T)
        tile, good = eliminate(predictive, count, noise, slack, True)
        status = tl.where((status == 0) & (good == 0), IS_INDEFINITE, status)
        pivots = diagonal(tile, o)
        inverse = inverse_of_factor(tile, pivots, o)
        tl.store(p_s + o_t, pivots, mask=m_t)

        # G, and what it takes from U.
        for k in range(0, K, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            b_projected = load_tile(p_g, o, o_k, T - first, K, K, 1)
            gain = tl.dot(inverse, b_projected, input_precision="ieee")
            tl.debug_barrier()
            store_tile(p_g, gain, o, o_k, T - first, K, K, 1)
        tl.debug_barrier()
        product(p_new_cov, K, 1, p_g, 1, K, p_g, K, 1, K, K, count, -1.0, True, "ieee", BLOCK, BLOCK, CHUNK)
    tl.store(p_info + i_b, status)


# Bytes moved: mean in and out, values in, once; weights and gains once a tile of C, from the second-level cache. With
# more than one chunk the mean is read and written again for each, from there too.
@triton.jit
def apply_kernel(
    p_mean, s_mb, s_mr, s_mc, p_weights, s_wb, s_wt, s_wk, p_values, s_zb, s_zt, s_zc,
    p_noise, s_nb, s_nt, p_mask, s_kb, s_kt, p_new_mean, p_s, p_kl, p_log_evidence,
    p_gain, p_energy, p_ticket, K, C, T, tiles,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of C, chunk by chunk:  E = L⁻¹ (Z − W R),  R ← R + GᵀE.

    L stands in what the factor phase left: L_tt² = s_t, and W Gᵀ is L below its diagonal.
    """
    C, s_mb, s_mr = fours(C, ALIGNED), fours(s_mb, ALIGNED), fours(s_mr, ALIGNED)
    s_zb, s_zt = fours(s_zb, ALIGNED), fours(s_zt, ALIGNED)
    i_tile = tl.program_id(0) % tiles
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    p_weights += i_b * s_wb
    p_values += i_b * s_zb
    p_noise += i_b * s_nb
    p_mask += i_b * s_kb
    p_new_mean += i_b * K * C
    p_s += i_b * T
    p_gain += i_b * T * K
    p_energy += i_b * tiles * T
    o, o_c = tl.arange(0, CHUNK), i_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_mean = load_tile(p_mean + i_b * s_mb, o_k, o_c, K, C, s_mr, s_mc)
        store_tile(p_new_mean, b_mean, o_k, o_c, K, C, C, 1)
    for first in range(0, T, CHUNK):
        o_t = first + o
        seen = seen_by(p_mask, s_kt, o_t, T, MASKED)
        tl.debug_barrier()
        lower, predicted = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, BLOCK_C), tl.float32)
        for k in range(0, K, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            b_weights = load_patterns(p_weights, o_t, o_k, seen, K, s_wt, s_wk)
            b_mean = load_tile(p_new_mean, o_k, o_c, K, C, C, 1)
            predicted = tl.dot(b_weights, b_mean, predicted, input_precision=PRECISION)
            b_gain = load_tile(p_gain, o_k, o_t, K, T, 1, K)
            lower = tl.dot(b_weights, b_gain, lower, input_precision="ieee")
        error = load_patterns(p_values, o_t, o_c, seen, C, s_zt, s_zc) - predicted
        root = tl.sqrt(tl.load(p_s + o_t, mask=o_t < T, other=1.0))
        lower = tl.where(o[:, None] == o[None, :], root[:, None], tl.where(o[:, None] > o[None, :], lower, 0.0))
        inverse = invert_lower(lower, tl.minimum(CHUNK, T - first))
        error = tl.dot(inverse, error, input_precision="ieee")
        tl.store(p_energy + i_tile * T + o_t, tl.sum(error * error, 1), mask=o_t < T)
        for k in range(0, K, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            b_gain = load_tile(p_gain, o_k, o_t, K, T, 1, K)
            b_mean = load_tile(p_new_mean, o_k, o_c, K, C, C, 1)
            b_mean = tl.dot(b_gain, error, b_mean, input_precision=PRECISION)
            tl.debug_barrier()
            store_tile(p_new_mean, b_mean, o_k, o_c, K, C, C, 1)
    tl.debug_barrier()
    if tl.atomic_add(p_ticket + i_b, 1, sem="acq_rel") == tiles - 1:
        tell(p_s, p_energy, tiles, p_kl + i_b * T, p_log_evidence + i_b, p_noise, s_nt, p_mask, s_kt, T, C,
             MASKED, CHUNK)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit
def cotangent(p, s_b, s_t, i_b, o_t, m_t, GIVEN: tl.constexpr):
    if GIVEN:
        return tl.load(p + i_b * s_b + o_t.to(tl.int64) * s_t, mask=m_t, other=0.0)
    else:
        return tl.zeros(o_t.shape, tl.float32)


@triton.jit
def copy_patterns(p_to, p_from, s_t, s, size, p_mask, s_kt, T, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Weights or values in float32, zero where hidden."""
    for t in range(0, T, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        seen = seen_by(p_mask, s_kt, o_t, T, MASKED)
        for j in range(0, size, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            b = load_patterns(p_from, o_t, o_j, seen, size, s_t, s)
            store_tile(p_to, b, o_t, o_j, T, size, size, 1)


# Bytes moved: at least the inputs and cotangents in and the gradients out, each once; the products read their operands
# from working memory, K² + 2 T² + 3 T (K + C) numbers a memory, which stays in the cache up to preset L.
@triton.jit
def update_backward_kernel(
    p_mean, s_mb, s_mr, s_mc, p_cov, s_ub, s_ur, s_uc, p_weights, s_wb, s_wt, s_wk, p_values, s_zb, s_zt, s_zc,
    p_noise, s_nb, s_nt, p_mask, s_kb, s_kt, p_grad_mean, s_gmb, s_gmr, s_gmc, p_grad_cov, s_gub, s_gur, s_guc,
    p_grad_s, s_gsb, s_gst, p_grad_kl, s_gkb, s_gkt, p_grad_evidence, s_geb,
    p_to_mean, p_to_cov, p_to_weights, p_to_values, p_to_noise, p_work, s_work, K, C, T, ld,
    MASKED: tl.constexpr, WITH_MEAN: tl.constexpr, WITH_COV: tl.constexpr, WITH_S: tl.constexpr, WITH_KL: tl.constexpr,
    WITH_EVIDENCE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """All patterns as one chunk. With bars for cotangents and primes for what is after the update:

    Ḡ = E R̄'ᵀ − 2 G Ū'        Ē = G R̄' + 2 diag(ē) E        V̄ = L⁻ᵀ Ḡ        Z̄ = L⁻ᵀ Ē
    L̄ = −tril(V̄ Gᵀ + Z̄ Eᵀ) + 2 diag(L_tt s̄_t)        S̄ = L⁻ᵀ Φ(Lᵀ L̄) L⁻¹, symmetric
    V̄ += S̄ W        W̄ = S̄ V − Z̄ Rᵀ + V̄ U        R̄ = R̄' − WᵀZ̄        Ū = Ū' + sym(WᵀV̄)
    """
    i_b = tl.program_id(0).to(tl.int64)
    p_mean += i_b * s_mb
    p_cov += i_b * s_ub
    p_mask += i_b * s_kb
    p_noise += i_b * s_nb
    p_to_mean += i_b * K * C
    p_to_cov += i_b * K * K
    p_to_weights += i_b * T * K
    p_to_values += i_b * T * C
    p_to_noise += i_b * T
    # Working memory. [T, T], rows of ld: S, then Lᵀ; L⁻¹; two more. [T, K]: W, V, G, V̄. [T, C]: E, Z̄.
    p_lower = p_work + i_b * s_work
    p_inverse = p_lower + T * ld
    p_x = p_inverse + T * ld
    p_y = p_x + T * ld
    p_w = p_y + T * ld
    p_v = p_w + T * K
    p_g = p_v + T * K
    p_v_bar = p_g + T * K
    p_e = p_v_bar + T * K
    p_z_bar = p_e + T * C
    copy_patterns(p_w, p_weights + i_b * s_wb, s_wt, s_wk, K, p_mask, s_kt, T, MASKED, BLOCK)
    copy_patterns(p_z_bar, p_values + i_b * s_zb, s_zt, s_zc, C, p_mask, s_kt, T, MASKED, BLOCK)
    copy_or_zero(p_to_mean, C, p_grad_mean + i_b * s_gmb, s_gmr, s_gmc, K, C, WITH_MEAN, BLOCK)
    tl.debug_barrier()

    # The update again: V, S, L, G and E.
    product(p_v, K, 1, p_w, K, 1, p_cov, s_ur, s_uc, T, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_lower, ld, 1, p_v, K, 1, p_w, 1, K, T, T, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    for t in range(0, T, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        m_t = o_t < T
        at = p_lower + o_t.to(tl.int64) * (ld + 1)
        noise = tl.load(p_noise + o_t.to(tl.int64) * s_nt, mask=m_t, other=0.0)
        tl.store(at, tl.load(at, mask=m_t, other=0.0) + noise, mask=m_t)
    tl.debug_barrier()
    factor(p_lower, p_inverse, T, ld, BLOCK, SINGLE)
    product(p_g, K, 1, p_inverse, ld, 1, p_v, K, 1, T, K, T, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_z_bar, C, 1, p_w, K, 1, p_mean, s_mr, s_mc, T, C, K, -1.0, True, PRECISION, BLOCK, BLOCK, 16)
    product(p_e, C, 1, p_inverse, ld, 1, p_z_bar, C, 1, T, C, T, 1.0, False, "ieee", BLOCK, BLOCK, 16)

    # Through the state: Ḡ in W̄'s place and Ē in Z̄'s.
    product(p_v_bar, K, 1, p_e, C, 1, p_to_mean, 1, C, T, K, C, 1.0, False, PRECISION, BLOCK, BLOCK, 16)
    if WITH_COV:
        p_gu = p_grad_cov + i_b * s_gub
        product(p_v_bar, K, 1, p_g, K, 1, p_gu, s_gur, s_guc, T, K, K, -1.0, True, "ieee", BLOCK, BLOCK, 16)
        product(p_v_bar, K, 1, p_g, K, 1, p_gu, s_guc, s_gur, T, K, K, -1.0, True, "ieee", BLOCK, BLOCK, 16)
    product(p_to_values, C, 1, p_g, K, 1, p_to_mean, C, 1, T, C, K, 1.0, False, PRECISION, BLOCK, BLOCK, 16)

    # Through what is told of each pattern, whose cotangents of L_tt² wait in the first row of x.
    evidence = 0.0
    if WITH_EVIDENCE:
        evidence = tl.load(p_grad_evidence + i_b * s_geb)
    for t in range(0, T, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        m_t = o_t < T
        seen = seen_by(p_mask, s_kt, o_t, T, MASKED)
        noise = tl.load(p_noise + o_t.to(tl.int64) * s_nt, mask=m_t, other=1.0)
        root = tl.load(p_lower + o_t.to(tl.int64) * (ld + 1), mask=m_t, other=1.0)
        s = tl.maximum(root * root, noise)
        floored = root * root <= noise
        s_bar = cotangent(p_grad_s, s_gsb, s_gst, i_b, o_t, m_t, WITH_S)
        kl_bar = tl.where(seen, cotangent(p_grad_kl, s_gkb, s_gkt, i_b, o_t, m_t, WITH_KL), 0.0)
        evidence_bar = tl.where(seen, evidence, 0.0)
        energy_bar = 0.5 * (kl_bar * (1 - noise / s) - evidence_bar)
        energy = tl.zeros((BLOCK,), tl.float32)
        for c in range(0, C, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            e = load_tile(p_e, o_t, o_c, T, C, C, 1)
            energy += tl.sum(e * e, 1)
            e_bar = load_tile(p_to_values, o_t, o_c, T, C, C, 1) + 2 * energy_bar[:, None] * e
            store_tile(p_to_values, e_bar, o_t, o_c, T, C, C, 1)
        of_s = s_bar + 0.5 * (kl_bar * (C * (s - noise) + energy * noise) / (s * s) - evidence_bar * C / s)
        of_noise = 0.5 * kl_bar * (C * (1 / s - 1 / noise) - energy / s)
        to_pivot = seen & (floored == 0)
        tl.store(p_x + o_t, tl.where(to_pivot, of_s, 0.0), mask=m_t)
        tl.store(p_to_noise + o_t, of_noise + tl.where(to_pivot, 0.0, of_s), mask=m_t)
    tl.debug_barrier()

    # Through the whitening: V̄, in the weights' gradient for now, and Z̄.
    product(p_to_weights, K, 1, p_inverse, 1, ld, p_v_bar, K, 1, T, K, T, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_z_bar, C, 1, p_inverse, 1, ld, p_to_values, C, 1, T, C, T, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_y, ld, 1, p_to_weights, K, 1, p_g, 1, K, T, T, K, -1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_y, ld, 1, p_z_bar, C, 1, p_e, 1, C, T, T, C, -1.0, True, PRECISION, BLOCK, BLOCK, 16)
    for t in range(0, T, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        pivot_bar = tl.load(p_x + o_t, mask=o_t < T, other=0.0)
        root = tl.load(p_lower + o_t.to(tl.int64) * (ld + 1), mask=o_t < T, other=1.0)
        for j in range(0, T, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            l_bar = load_tile(p_y, o_t, o_j, T, T, ld, 1)
            l_bar = tl.where(o_t[:, None] >= o_j[None, :], l_bar, 0.0)
            l_bar += tl.where(o_t[:, None] == o_j[None, :], (2 * root * pivot_bar)[:, None], 0.0)
            upper = load_tile(p_lower, o_t, o_j, T, T, ld, 1)
            tl.debug_barrier()
            store_tile(p_y, l_bar, o_t, o_j, T, T, ld, 1)
            store_tile(p_lower, tl.where(o_t[:, None] <= o_j[None, :], upper, 0.0), o_t, o_j, T, T, ld, 1)
    tl.debug_barrier()

    # Through the Cholesky factor: the lower triangle of Lᵀ L̄, halved and mirrored, between L⁻ᵀ and L⁻¹.
    product(p_x, ld, 1, p_lower, ld, 1, p_y, ld, 1, T, T, T, 0.5, False, "ieee", BLOCK, BLOCK, 16)
    fill_both_triangles(p_y, p_x, T, ld, BLOCK)
    product(p_x, ld, 1, p_inverse, 1, ld, p_y, ld, 1, T, T, T, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_y, ld, 1, p_x, ld, 1, p_inverse, ld, 1, T, T, T, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    for t in range(0, T, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        m_t = o_t < T
        s_bar = tl.load(p_y + o_t.to(tl.int64) * (ld + 1), mask=m_t, other=0.0)
        told = tl.load(p_to_noise + o_t, mask=m_t, other=0.0)
        s_direct = cotangent(p_grad_s, s_gsb, s_gst, i_b, o_t, m_t, WITH_S)
        seen = seen_by(p_mask, s_kt, o_t, T, MASKED)
        tl.store(p_to_noise + o_t, tl.where(seen, told + s_bar, s_direct), mask=m_t)

    # Down to the arguments.
    product(p_to_weights, K, 1, p_y, ld, 1, p_w, K, 1, T, K, T, 1.0, True, "ieee", BLOCK, BLOCK, 16)
    copy_or_zero(p_v_bar, K, p_to_weights, K, 1, T, K, True, BLOCK)
    tl.debug_barrier()
    product(p_to_weights, K, 1, p_y, ld, 1, p_v, K, 1, T, K, T, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_to_weights, K, 1, p_z_bar, C, 1, p_mean, s_mc, s_mr, T, K, C, -1.0, True, PRECISION, BLOCK, BLOCK, 16)
    product(p_to_weights, K, 1, p_v_bar, K, 1, p_cov, s_ur, s_uc, T, K, K, 1.0, True, "ieee", BLOCK, BLOCK, 16)
    product(p_to_mean, C, 1, p_w, 1, K, p_z_bar, C, 1, K, C, T, -1.0, True, PRECISION, BLOCK, BLOCK, 16)
    copy_or_zero(p_to_cov, K, p_grad_cov + i_b * s_gub, s_gur, s_guc, K, K, WITH_COV, BLOCK)
    tl.debug_barrier()
    product(p_to_cov, K, 1, p_w, 1, K, p_v_bar, K, 1, K, K, T, 0.5, True, "ieee", BLOCK, BLOCK, 16)
    product(p_to_cov, K, 1, p_v_bar, 1, K, p_w, K, 1, K, K, T, 0.5, True, "ieee", BLOCK, BLOCK, 16)

    # A masked pattern has no say, so nothing flows back to it.
    for t in range(0, T, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        seen = seen_by(p_mask, s_kt, o_t, T, MASKED)
        for k in range(0, K, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            b = tl.where(seen[:, None], load_tile(p_to_weights, o_t, o_k, T, K, K, 1), 0.0)
            store_tile(p_to_weights, b, o_t, o_k, T, K, K, 1)
        for c in range(0, C, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            b = tl.where(seen[:, None], load_tile(p_z_bar, o_t, o_c, T, C, C, 1), 0.0)
            store_tile(p_to_values, b, o_t, o_c, T, C, C, 1)


# ----------------------------------------------------------------------------------------------------------- launchers

# The largest covariance that the registers of one program hold, and the warps that makes.
LARGEST_TILE = 128
WARPS = {16: 1, 32: 4, 64: 4, 128: 8}

# Fewer memories than this do not fill a chip, so their columns are spread over it.
FEW_MEMORIES = 64


def in_registers(rows: int, precision: str) -> bool:
    return rows <= LARGEST_TILE and precision == "ieee"


@implements("update_posterior")
def update_posterior_launcher(
    mean: Tensor, cov: Tensor, weights: Tensor, values: Tensor, noise_var: Tensor, mask: Tensor | None, precision: int
):
    (B, K, C), T, rounding = mean.shape, weights.shape[1], precision_of(precision)
    new_mean, new_cov = mean.new_empty(mean.shape), mean.new_empty(cov.shape)
    s, kl, log_evidence = mean.new_empty(B, T), mean.new_empty(B, T), mean.new_empty(B)
    info = mean.new_empty(B, dtype=torch.int32)
    outputs = new_mean, new_cov, s, kl, log_evidence, info
    if not B:
        return outputs
    shared = {"MASKED": mask is not None, "ALIGNED": rows_aligned(mean, values), "CHUNK": CHUNK}
    seen = (noise_var if mask is None else mask.view(torch.uint8), *strides(mask, 2))
    of_mean, of_cov = (mean, *mean.stride()), (cov, *cov.stride())
    patterns = (weights, *weights.stride(), values, *values.stride(), noise_var, *noise_var.stride(), *seen)
    gain = mean.new_empty(B, T, K)
    ticket = torch.zeros(B, dtype=torch.int32, device=mean.device)
    if in_registers(K, rounding):
        block = max(16, triton.next_power_of_2(K))
        size = {"BLOCK": block, "BLOCK_C": BLOCK, **warps(WARPS[block]), **shared}
        tiles = max(1, triton.cdiv(C, size["BLOCK_C"]))
        energy = mean.new_empty(B, tiles, T)
        split = B < FEW_MEMORIES and tiles > 1
        for phase in (True, False) if split else (True,):
            update_kernel[(B if phase else B * tiles,)](
                *of_mean, *of_cov, *patterns, *outputs, gain, energy, ticket, K, C, T, tiles,
                FACTOR=phase, SPLIT=split, **size,
            )  # fmt: skip
        return outputs
    tiles = max(1, triton.cdiv(C, BLOCK))
    energy = mean.new_empty(B, tiles, T)
    factor_kernel[(B,)](
        *of_cov, weights, *weights.stride(), noise_var, *noise_var.stride(), *seen,
        new_cov, s, info, gain, K, T, MASKED=mask is not None, CHUNK=CHUNK, BLOCK=BLOCK, **warps(4),
    )  # fmt: skip
    apply_kernel[(B * tiles,)](
        *of_mean, *patterns, new_mean, s, kl, log_evidence, gain, energy, ticket, K, C, T, tiles,
        PRECISION=rounding, BLOCK_K=BLOCK, BLOCK_C=BLOCK, **warps(4), **shared,
    )  # fmt: skip
    return outputs


@implements("update_posterior_backward")
def update_posterior_backward(
    mean, cov, weights, values, noise_var, mask, precision,
    grad_mean, grad_cov, grad_innovation_var, grad_kl, grad_log_evidence,
):  # fmt: skip
    (B, K, C), T = mean.shape, weights.shape[1]
    ld = row_stride(T)
    to = [mean.new_empty(x.shape) for x in (mean, cov, weights, values, noise_var)]
    if not B:
        return tuple(to)
    work = workspace(mean, B, 4 * T * ld + 4 * T * K + 2 * T * C)
    inputs = [y for x in (mean, cov, weights, values, noise_var) for y in (x, *x.stride())]
    seen = (noise_var if mask is None else mask.view(torch.uint8), *strides(mask, 2))
    axes = (3, 3, 2, 2, 1)
    grads = (grad_mean, grad_cov, grad_innovation_var, grad_kl, grad_log_evidence)
    cotangents = [y for x, n in zip(grads, axes, strict=True) for y in (noise_var if x is None else x, *strides(x, n))]
    given = dict(
        zip(
            ("WITH_MEAN", "WITH_COV", "WITH_S", "WITH_KL", "WITH_EVIDENCE"), (x is not None for x in grads), strict=True
        )
    )
    update_backward_kernel[(B,)](
        *inputs, *seen, *cotangents, *to, work, work.stride(0), K, C, T, ld,
        MASKED=mask is not None, PRECISION=precision_of(precision), **given, **square(T),
    )  # fmt: skip
    return tuple(to)


_operators = torch.ops.fastkm_triton

update_posterior = differentiable(_operators.update_posterior.default, _operators.update_posterior_backward.default)
