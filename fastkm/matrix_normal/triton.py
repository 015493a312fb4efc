"""Triton kernels of kl_memory and logdet: one launch, one program a memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkm._linalg.triton import (
    factor,
    implements,
    load_symmetric,
    load_tile,
    product,
    row_stride,
    square,
    store_tile,
    workspace,
)
from fastkm._runtime.autograd import differentiable


@triton.jit
def factor_covariance(p_lower, p_inverse, ld, p_cov, s_row, s_col, n, BLOCK: tl.constexpr, SINGLE: tl.constexpr):
    """Lᵀ and L⁻¹ of a covariance; returns ln|U| and its status."""
    status = load_symmetric(p_lower, ld, p_cov, s_row, s_col, n, BLOCK)
    log_det, good = factor(p_lower, p_inverse, n, ld, BLOCK, SINGLE)
    return log_det, tl.where(status != 0, status, tl.where(good, 0, 2))


# Bytes moved: K² in; the working memory (2 K²) stays in the cache of its multiprocessor.
@triton.jit
def logdet_kernel(
    p_cov, s_cb, s_cr, s_cc, p_result, p_info, p_work, s_work, K, ld, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    p_lower = p_work + i_b * s_work
    log_det, status = factor_covariance(p_lower, p_lower + K * ld, ld, p_cov + i_b * s_cb, s_cr, s_cc, K, BLOCK, SINGLE)
    tl.store(p_result + i_b, log_det)
    tl.store(p_info + i_b, status)


@triton.jit
def logdet_backward_kernel(
    p_cov, s_cb, s_cr, s_cc, p_grad, s_gb, p_to_cov, p_work, s_work, K, ld, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Ū = g U⁻¹"""
    i_b = tl.program_id(0).to(tl.int64)
    p_lower = p_work + i_b * s_work
    p_inverse = p_lower + K * ld
    _, status = factor_covariance(p_lower, p_inverse, ld, p_cov + i_b * s_cb, s_cr, s_cc, K, BLOCK, SINGLE)
    g = tl.where(status == 0, tl.load(p_grad + i_b * s_gb), float("nan"))
    p_to_cov += i_b * K * K
    product(p_to_cov, K, 1, p_inverse, 1, ld, p_inverse, ld, 1, K, K, K, g, False, "ieee", BLOCK, BLOCK, 16)


# Bytes moved: 2 (K² + KC) in, each once.
@triton.jit
def kl_memory_kernel(
    p_mean, s_mb, s_mr, s_mc, p_cov, s_cb, s_cr, s_cc,
    p_prior_mean, s_pb, s_pr, s_pc, p_prior_cov, s_qb, s_qr, s_qc,
    p_result, p_info, p_work, s_work, K, C, ld,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """½ [C tr(U0⁻¹U) + tr(ΔᵀU0⁻¹Δ) − KC + C (ln|U0| − ln|U|)]; a trace is the squared norm of L0⁻¹L, or of L0⁻¹Δ."""
    i_b = tl.program_id(0).to(tl.int64)
    p_lower = p_work + i_b * s_work  # Lᵀ
    p_inverse = p_lower + K * ld  # L⁻¹, then L0⁻¹
    p_prior = p_inverse + K * ld  # L0ᵀ
    log_det, status = factor_covariance(p_lower, p_inverse, ld, p_cov + i_b * s_cb, s_cr, s_cc, K, BLOCK, SINGLE)
    prior_log_det, prior_status = factor_covariance(
        p_prior, p_inverse, ld, p_prior_cov + i_b * s_qb, s_qr, s_qc, K, BLOCK, SINGLE
    )
    p_mean += i_b * s_mb
    p_prior_mean += i_b * s_pb

    spread, shift = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    for i in range(0, K, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        # The spread: rows i of L0⁻¹ L, whose blocks right of the diagonal are zero.
        for j in range(0, i + BLOCK, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK, BLOCK), tl.float32)
            for k in range(j, i + BLOCK, 16):
                o_k = k + tl.arange(0, 16)
                b_inverse = load_tile(p_inverse, o_i, o_k, K, K, ld, 1)
                b_lower = load_tile(p_lower, o_k, o_j, K, K, 1, ld)
                b_lower = tl.where(o_k[:, None] >= o_j[None, :], b_lower, 0.0)
                total = tl.dot(b_inverse, b_lower, total, input_precision="ieee")
            spread += tl.sum(tl.sum(total * total, 1).to(tl.float64), 0)
        # The shift: rows i of L0⁻¹ (R − R0).
        for c in range(0, C, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK, BLOCK), tl.float32)
            for k in range(0, i + BLOCK, 16):
                o_k = k + tl.arange(0, 16)
                b_inverse = load_tile(p_inverse, o_i, o_k, K, K, ld, 1)
                b_gap = load_tile(p_mean, o_k, o_c, K, C, s_mr, s_mc)
                b_gap -= load_tile(p_prior_mean, o_k, o_c, K, C, s_pr, s_pc)
                total = tl.dot(b_inverse, b_gap, total, input_precision="ieee")
            shift += tl.sum(tl.sum(total * total, 1).to(tl.float64), 0)
    growth = prior_log_det.to(tl.float64) - log_det.to(tl.float64)
    kl = 0.5 * (C * (spread - K + growth) + shift)
    tl.store(p_result + i_b, kl.to(tl.float32))
    tl.store(p_info + i_b, tl.maximum(status, prior_status))


@triton.jit
def kl_memory_backward_kernel(
    p_mean, s_mb, s_mr, s_mc, p_cov, s_cb, s_cr, s_cc,
    p_prior_mean, s_pb, s_pr, s_pc, p_prior_cov, s_qb, s_qr, s_qc, p_grad, s_gb,
    p_to_mean, p_to_cov, p_to_prior_mean, p_to_prior_cov, p_work, s_work, K, C, ld,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """With E = U0⁻¹Δ and P = U0⁻¹ (U0 − U):  R̄ = g E = −R̄0,  Ū = −½ g C P U⁻¹,  Ū0 = ½ g (C P U0⁻¹ − E Eᵀ).

    Both covariances start from P: a posterior is often close to its prior, and the difference of two inverses would
    then be their rounding.
    """
    i_b = tl.program_id(0).to(tl.int64)
    p_lower = p_work + i_b * s_work  # L⁻¹ is what is wanted; its Lᵀ makes room for products
    p_inverse = p_lower + K * ld
    p_prior = p_inverse + K * ld
    p_prior_inverse = p_prior + K * ld
    p_relative = p_prior_inverse + K * ld  # P
    p_solved = p_relative + K * ld  # L0⁻¹ Δ [K, C]
    _, status = factor_covariance(p_lower, p_inverse, ld, p_cov + i_b * s_cb, s_cr, s_cc, K, BLOCK, SINGLE)
    _, prior_status = factor_covariance(
        p_prior, p_prior_inverse, ld, p_prior_cov + i_b * s_qb, s_qr, s_qc, K, BLOCK, SINGLE
    )
    good = (status == 0) & (prior_status == 0)
    g = tl.where(good, tl.load(p_grad + i_b * s_gb), float("nan"))
    p_mean += i_b * s_mb
    p_prior_mean += i_b * s_pb
    p_cov += i_b * s_cb
    p_prior_cov += i_b * s_qb
    p_to_mean += i_b * K * C
    p_to_prior_mean += i_b * K * C
    p_to_cov += i_b * K * K
    p_to_prior_cov += i_b * K * K

    # Δ and U0 − U, of which the divergence reads the lower triangle.
    for i in range(0, K, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for c in range(0, C, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            b_gap = load_tile(p_mean, o_i, o_c, K, C, s_mr, s_mc)
            b_gap -= load_tile(p_prior_mean, o_i, o_c, K, C, s_pr, s_pc)
            store_tile(p_to_prior_mean, b_gap, o_i, o_c, K, C, C, 1)
        for j in range(0, i + BLOCK, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            b_gap = load_tile(p_prior_cov, o_i, o_j, K, K, s_qr, s_qc) - load_tile(p_cov, o_i, o_j, K, K, s_cr, s_cc)
            m_lower = o_i[:, None] >= o_j[None, :]
            at = o_i.to(tl.int64)[:, None] * ld + o_j[None, :]
            m = m_lower & (o_i < K)[:, None]
            tl.store(p_lower + at, b_gap, mask=m)
            tl.store(p_lower + o_j.to(tl.int64)[None, :] * ld + o_i[:, None], b_gap, mask=m)
    tl.debug_barrier()

    # P, by both halves of the solve with U0.
    product(p_prior, ld, 1, p_prior_inverse, ld, 1, p_lower, ld, 1, K, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_relative, ld, 1, p_prior_inverse, 1, ld, p_prior, ld, 1, K, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)

    # The means.
    product(p_solved, C, 1, p_prior_inverse, ld, 1, p_to_prior_mean, C, 1, K, C, K, 1.0, False, "ieee",
            BLOCK, BLOCK, 16)  # fmt: skip
    product(p_to_mean, C, 1, p_prior_inverse, 1, ld, p_solved, C, 1, K, C, K, g, False, "ieee", BLOCK, BLOCK, 16)
    product(p_to_prior_mean, C, 1, p_prior_inverse, 1, ld, p_solved, C, 1, K, C, K, -1.0, False, "ieee",
            BLOCK, BLOCK, 16)  # fmt: skip

    # The covariances.
    half = 0.5 * g
    product(p_lower, ld, 1, p_relative, ld, 1, p_inverse, 1, ld, K, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_to_cov, K, 1, p_lower, ld, 1, p_inverse, ld, 1, K, K, K, -half * C, False, "ieee", BLOCK, BLOCK, 16)
    product(p_lower, ld, 1, p_relative, ld, 1, p_prior_inverse, 1, ld, K, K, K, 1.0, False, "ieee", BLOCK, BLOCK, 16)
    product(p_to_prior_cov, K, 1, p_lower, ld, 1, p_prior_inverse, ld, 1, K, K, K, half * C, False, "ieee",
            BLOCK, BLOCK, 16)  # fmt: skip
    product(p_to_prior_cov, K, 1, p_to_prior_mean, C, 1, p_to_prior_mean, 1, C, K, K, C, -half, True, "ieee",
            BLOCK, BLOCK, 16)  # fmt: skip
    for i in range(0, K, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for c in range(0, C, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            b = load_tile(p_to_mean, o_i, o_c, K, C, C, 1)
            store_tile(p_to_prior_mean, -b, o_i, o_c, K, C, C, 1)


def logdet_launcher(cov: Tensor) -> tuple[Tensor, Tensor]:
    (B, K, _), ld = cov.shape, row_stride(cov.shape[1])
    result, info = cov.new_empty(B), cov.new_empty(B, dtype=torch.int32)
    if B:
        work = workspace(cov, B, 2 * K * ld)
        logdet_kernel[(B,)](cov, *cov.stride(), result, info, work, work.stride(0), K, ld, **square(K))
    return result, info


def logdet_backward(cov: Tensor, grad_logdet: Tensor) -> Tensor:
    (B, K, _), ld = cov.shape, row_stride(cov.shape[1])
    to_cov = cov.new_empty(cov.shape)
    if to_cov.numel():
        work = workspace(cov, B, 2 * K * ld)
        logdet_backward_kernel[(B,)](
            cov, *cov.stride(), grad_logdet, *grad_logdet.stride(), to_cov, work, work.stride(0), K, ld, **square(K)
        )
    return to_cov


def kl_memory_launcher(mean: Tensor, cov: Tensor, prior_mean: Tensor, prior_cov: Tensor) -> tuple[Tensor, Tensor]:
    (B, K, C), ld = mean.shape, row_stride(mean.shape[1])
    kl, info = mean.new_empty(B), mean.new_empty(B, dtype=torch.int32)
    if B:
        work = workspace(mean, B, 3 * K * ld)
        inputs = [y for x in (mean, cov, prior_mean, prior_cov) for y in (x, *x.stride())]
        kl_memory_kernel[(B,)](*inputs, kl, info, work, work.stride(0), K, C, ld, **square(K))
    return kl, info


def kl_memory_backward(mean: Tensor, cov: Tensor, prior_mean: Tensor, prior_cov: Tensor, grad_kl: Tensor):
    (B, K, C), ld = mean.shape, row_stride(mean.shape[1])
    grads = [x.new_empty(x.shape) for x in (mean, cov, prior_mean, prior_cov)]
    if B:
        work = workspace(mean, B, 5 * K * ld + K * C)
        inputs = [y for x in (mean, cov, prior_mean, prior_cov, grad_kl) for y in (x, *x.stride())]
        kl_memory_backward_kernel[(B,)](*inputs, *grads, work, work.stride(0), K, C, ld, **square(K))
    return tuple(grads)


implements("logdet")(logdet_launcher)
implements("logdet_backward")(logdet_backward)
implements("kl_memory")(kl_memory_launcher)
implements("kl_memory_backward")(kl_memory_backward)

_operators = torch.ops.fastkm_triton

kl_memory = differentiable(_operators.kl_memory.default, _operators.kl_memory_backward.default)
logdet = differentiable(_operators.logdet.default, _operators.logdet_backward.default)
