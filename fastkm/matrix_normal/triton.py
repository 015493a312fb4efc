"""Triton kernels of kl_memory and logdet: one launch, one program a memory."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkm._linalg.triton.factor import IS_INDEFINITE, factor, load_symmetric
from fastkm._linalg.triton.launch import (
    factoring,
    implements,
    matrices,
    numbers,
    row_stride,
    workspace,
)
from fastkm._linalg.triton.product import STEP, product
from fastkm._linalg.triton.tiles import (
    BLOCK,
    end_of,
    load_diagonal,
    load_tile,
    lower_triangle,
    matrix_of,
    number_of,
    place,
    place_after,
    result_of,
    store_tile,
    transposed,
)
from fastkm._linalg.triton.vectors import variance_divergence
from fastkm._runtime.autograd import differentiable


class Prior(NamedTuple):
    """A memory and its prior as kernel arguments, and as ``state_of`` returns them of one memory."""

    mean: Any
    cov: Any
    prior_mean: Any
    prior_cov: Any


@triton.jit
def state_of(x, i_b, K, C):
    """The memory ``i_b`` and its prior."""
    return Prior(
        matrix_of(x.mean, i_b, K, C),
        matrix_of(x.cov, i_b, K, K),
        matrix_of(x.prior_mean, i_b, K, C),
        matrix_of(x.prior_cov, i_b, K, K),
    )


@triton.jit
def factor_covariance(lower, inverse, cov, SINGLE: tl.constexpr):
    """Lᵀ and L⁻¹ of a covariance; returns ln|U| and its status."""
    status = load_symmetric(lower, cov)
    log_det, good = factor(lower, inverse, SINGLE)
    return log_det, tl.where(status != 0, status, tl.where(good, 0, IS_INDEFINITE))


# -------------------------------------------------------------------------------------------------------------- logdet


class Factor(NamedTuple):
    """The workspace of logdet."""

    lower: Any  # U, then Lᵀ [K, K]
    inverse: Any  # L⁻¹ [K, K]
    end: Any


@triton.jit
def logdet_layout(p, K, ld):
    lower = place(p, K, K, ld)
    inverse = place_after(lower, K, K, ld)
    return Factor(lower, inverse, end_of(inverse))


@triton.jit
def logdet_kernel(cov, p_result, p_status, workspaces, K, ld, SINGLE: tl.constexpr):
    """ln|U|. Bytes moved: K² in; the workspace (2 K²) stays in the cache of its multiprocessor."""
    i_b = tl.program_id(0).to(tl.int64)
    parts = logdet_layout(workspaces.p + i_b * workspaces.s_b, K, ld)
    log_det, status = factor_covariance(parts.lower, parts.inverse, matrix_of(cov, i_b, K, K), SINGLE)
    tl.store(p_result + i_b, log_det)
    tl.store(p_status + i_b, status)


@triton.jit
def logdet_backward_kernel(cov, grad, p_to_cov, workspaces, K, ld, SINGLE: tl.constexpr):
    """Ū = g U⁻¹"""
    i_b = tl.program_id(0).to(tl.int64)
    parts = logdet_layout(workspaces.p + i_b * workspaces.s_b, K, ld)
    _, status = factor_covariance(parts.lower, parts.inverse, matrix_of(cov, i_b, K, K), SINGLE)
    g = tl.where(status == 0, number_of(grad, i_b), float("nan"))
    product(result_of(p_to_cov, i_b, K, K), transposed(parts.inverse), parts.inverse, scale=g)


# ----------------------------------------------------------------------------------------------------------- kl_memory


class KlParts(NamedTuple):
    """The workspace of kl_memory."""

    lower: Any  # U, then Lᵀ [K, K]
    inverse: Any  # L⁻¹, then L0⁻¹ [K, K]
    prior_lower: Any  # U0, then L0ᵀ [K, K]
    end: Any


@triton.jit
def kl_memory_layout(p, K, ld):
    lower = place(p, K, K, ld)
    inverse = place_after(lower, K, K, ld)
    prior_lower = place_after(inverse, K, K, ld)
    return KlParts(lower, inverse, prior_lower, end_of(prior_lower))


@triton.jit
def kl_memory_kernel(states, p_result, p_status, workspaces, K, C, ld, SINGLE: tl.constexpr):
    """½ [C tr(U0⁻¹U) + tr(ΔᵀU0⁻¹Δ) − KC + C (ln|U0| − ln|U|)], as a sum of terms that are not negative.

    With M = L0⁻¹L and D its diagonal m:  ½ [C (Σ (m_i² − 1 − ln m_i²) + ‖M − D‖²) + ‖L0⁻¹Δ‖²].

    Bytes moved: 2 (K² + KC) in, each once.
    """
    i_b = tl.program_id(0).to(tl.int64)
    parts = kl_memory_layout(workspaces.p + i_b * workspaces.s_b, K, ld)
    state = state_of(states, i_b, K, C)
    _, status = factor_covariance(parts.lower, parts.inverse, state.cov, SINGLE)
    _, prior_status = factor_covariance(parts.prior_lower, parts.inverse, state.prior_cov, SINGLE)
    spread, shift = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    for i in range(0, K, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        # Rows i of M − D, which is zero right of the diagonal block.
        for j in range(0, i + BLOCK, BLOCK):
            spread += squared_norm(relative_factor(parts, i, j))
        spread += tl.sum(divergence_of_diagonal(parts, o_i).to(tl.float64), 0)
        # Rows i of L0⁻¹ (R − R0).
        for c in range(0, C, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK, BLOCK), tl.float32)
            for k in range(0, i + BLOCK, STEP):
                o_k = k + tl.arange(0, STEP)
                gap = load_tile(state.mean, o_k, o_c) - load_tile(state.prior_mean, o_k, o_c)
                total = tl.dot(load_tile(parts.inverse, o_i, o_k), gap, total, input_precision="ieee")
            shift += squared_norm(total)
    tl.store(p_result + i_b, (0.5 * (C * spread + shift)).to(tl.float32))
    tl.store(p_status + i_b, tl.maximum(status, prior_status))


@triton.jit
def divergence_of_diagonal(parts, o):
    """m² − 1 − ln m² for rows ``o``, 0 past the last."""
    own, prior = load_diagonal(parts.lower, o, 1.0), load_diagonal(parts.prior_lower, o, 1.0)
    m, excess = own / prior, (own - prior) / prior
    return variance_divergence(m * m, excess * (2 + excess))


@triton.jit
def relative_factor(parts, i, j):
    """Block (i, j) of M − D = L0⁻¹ (L − L0 D), from L0⁻¹, Lᵀ and L0ᵀ."""
    o_i, o_j = i + tl.arange(0, BLOCK), j + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    m = load_diagonal(parts.lower, o_j, 1.0) / load_diagonal(parts.prior_lower, o_j, 1.0)
    for k in range(j, i + BLOCK, STEP):
        o_k = k + tl.arange(0, STEP)
        own, prior = load_tile(transposed(parts.lower), o_k, o_j), load_tile(transposed(parts.prior_lower), o_k, o_j)
        gap = tl.where(o_k[:, None] > o_j[None, :], own - prior * m[None, :], 0.0)
        total = tl.dot(load_tile(parts.inverse, o_i, o_k), gap, total, input_precision="ieee")
    return total


@triton.jit
def squared_norm(tile):
    return tl.sum(tl.sum(tile * tile, 1).to(tl.float64), 0)


# -------------------------------------------------------------------------------------------------- kl_memory, backward


class KlBackwardParts(NamedTuple):
    """The workspace of kl_memory_backward."""

    lower: Any  # U, then Lᵀ; then U0 − U and products [K, K]
    inverse: Any  # L⁻¹ [K, K]
    prior_lower: Any  # U0, then L0ᵀ; then a product [K, K]
    prior_inverse: Any  # L0⁻¹ [K, K]
    relative: Any  # P [K, K]
    solved: Any  # L0⁻¹ Δ [K, C]
    end: Any


@triton.jit
def kl_memory_backward_layout(p, K, C, ld):
    lower = place(p, K, K, ld)
    inverse = place_after(lower, K, K, ld)
    prior_lower = place_after(inverse, K, K, ld)
    prior_inverse = place_after(prior_lower, K, K, ld)
    relative = place_after(prior_inverse, K, K, ld)
    solved = place_after(relative, K, C, C)
    return KlBackwardParts(lower, inverse, prior_lower, prior_inverse, relative, solved, end_of(solved))


@triton.jit
def kl_memory_backward_kernel(states, grad, to, workspaces, K, C, ld, SINGLE: tl.constexpr):
    """With E = U0⁻¹Δ and P = U0⁻¹ (U0 − U):  R̄ = g E = −R̄0,  Ū = −½ g C P U⁻¹,  Ū0 = ½ g (C P U0⁻¹ − E Eᵀ).

    Both covariances start from P: a posterior is often close to its prior, and the difference of two inverses would
    then be their rounding. Bytes moved: at least the memory and its prior in and their gradients out, each once.
    """
    i_b = tl.program_id(0).to(tl.int64)
    parts = kl_memory_backward_layout(workspaces.p + i_b * workspaces.s_b, K, C, ld)
    state = state_of(states, i_b, K, C)
    _, status = factor_covariance(parts.lower, parts.inverse, state.cov, SINGLE)
    _, prior_status = factor_covariance(parts.prior_lower, parts.prior_inverse, state.prior_cov, SINGLE)
    good = (status == 0) & (prior_status == 0)
    g = tl.where(good, number_of(grad, i_b), float("nan"))
    to = Prior(
        result_of(to.mean, i_b, K, C),
        result_of(to.cov, i_b, K, K),
        result_of(to.prior_mean, i_b, K, C),
        result_of(to.prior_cov, i_b, K, K),
    )
    gap = parts.lower  # Lᵀ is not needed any more
    store_gaps(to.prior_mean, gap, state)

    # P, by both halves of the solve with U0.
    product(parts.prior_lower, parts.prior_inverse, gap)
    product(parts.relative, transposed(parts.prior_inverse), parts.prior_lower)

    # The means; E stays in the place of R̄0.
    product(parts.solved, parts.prior_inverse, to.prior_mean)
    product(to.mean, transposed(parts.prior_inverse), parts.solved, scale=g)
    product(to.prior_mean, transposed(parts.prior_inverse), parts.solved, scale=-1.0)

    # The covariances.
    half = 0.5 * g
    product(parts.lower, parts.relative, transposed(parts.inverse))
    product(to.cov, parts.lower, parts.inverse, scale=-half * C)
    product(parts.lower, parts.relative, transposed(parts.prior_inverse))
    product(to.prior_cov, parts.lower, parts.prior_inverse, scale=half * C)
    product(to.prior_cov, to.prior_mean, transposed(to.prior_mean), scale=-half, accumulate=True)
    for i in range(0, K, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for c in range(0, C, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            store_tile(to.prior_mean, -load_tile(to.mean, o_i, o_c), o_i, o_c)


@triton.jit
def store_gaps(to_mean, to_cov, state):
    """Δ = R − R0, and U0 − U from its lower triangle, which is all that the divergence reads. Ends with a barrier."""
    K, C = to_mean.rows, to_mean.columns
    for i in range(0, K, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for c in range(0, C, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            gap = load_tile(state.mean, o_i, o_c) - load_tile(state.prior_mean, o_i, o_c)
            store_tile(to_mean, gap, o_i, o_c)
        for j in range(0, i + BLOCK, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            gap = load_tile(state.prior_cov, o_i, o_j) - load_tile(state.cov, o_i, o_j)
            m = lower_triangle(o_i, o_j) & (o_i < K)[:, None]
            tl.store(to_cov.p + o_i.to(tl.int64)[:, None] * to_cov.s_row + o_j[None, :], gap, mask=m)
            tl.store(to_cov.p + o_j.to(tl.int64)[None, :] * to_cov.s_row + o_i[:, None], gap, mask=m)
    tl.debug_barrier()


# ----------------------------------------------------------------------------------------------------------- launchers


@implements("logdet")
def logdet_launcher(cov: Tensor) -> tuple[Tensor, Tensor]:
    (B, K, _), ld = cov.shape, row_stride(cov.shape[1])
    result, status = cov.new_empty(B), cov.new_empty(B, dtype=torch.int32)
    if B:
        workspaces = workspace(cov, B, logdet_layout, K, ld)
        logdet_kernel[(B,)](matrices(cov), result, status, workspaces, K, ld, **factoring(K))
    return result, status


@implements("logdet_backward")
def logdet_backward(cov: Tensor, grad_logdet: Tensor) -> Tensor:
    (B, K, _), ld = cov.shape, row_stride(cov.shape[1])
    to_cov = cov.new_empty(cov.shape)
    if to_cov.numel():
        workspaces = workspace(cov, B, logdet_layout, K, ld)
        logdet_backward_kernel[(B,)](matrices(cov), numbers(grad_logdet), to_cov, workspaces, K, ld, **factoring(K))
    return to_cov


@implements("kl_memory")
def kl_memory_launcher(mean: Tensor, cov: Tensor, prior_mean: Tensor, prior_cov: Tensor) -> tuple[Tensor, Tensor]:
    (B, K, C), ld = mean.shape, row_stride(mean.shape[1])
    kl, status = mean.new_empty(B), mean.new_empty(B, dtype=torch.int32)
    if B:
        states = Prior(*map(matrices, (mean, cov, prior_mean, prior_cov)))
        workspaces = workspace(mean, B, kl_memory_layout, K, ld)
        kl_memory_kernel[(B,)](states, kl, status, workspaces, K, C, ld, **factoring(K))
    return kl, status


@implements("kl_memory_backward")
def kl_memory_backward(mean: Tensor, cov: Tensor, prior_mean: Tensor, prior_cov: Tensor, grad_kl: Tensor):
    (B, K, C), ld = mean.shape, row_stride(mean.shape[1])
    inputs = mean, cov, prior_mean, prior_cov
    to = Prior(*(x.new_empty(x.shape) for x in inputs))
    if B:
        states, workspaces = Prior(*map(matrices, inputs)), workspace(mean, B, kl_memory_backward_layout, K, C, ld)
        kl_memory_backward_kernel[(B,)](states, numbers(grad_kl), to, workspaces, K, C, ld, **factoring(K))
    return tuple(to)


_operators = torch.ops.fastkm_triton

kl_memory = differentiable(_operators.kl_memory.default, _operators.kl_memory_backward.default)
logdet = differentiable(_operators.logdet.default, _operators.logdet_backward.default)
