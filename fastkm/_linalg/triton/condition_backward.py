"""The gradient of an update, with weights that are an argument: of update_posterior, and the first half of write's."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastkm._linalg.triton.factor import factor, mirror_lower
from fastkm._linalg.triton.launch import (
    factoring,
    implements,
    mask_vectors,
    matrices,
    numbers,
    precision_of,
    row_stride,
    vectors,
    workspace,
)
from fastkm._linalg.triton.patterns import Patterns, copy_patterns, is_written, patterns_of
from fastkm._linalg.triton.product import product
from fastkm._linalg.triton.tiles import (
    BLOCK,
    copy,
    copy_or_zero,
    end_of,
    load_diagonal,
    load_tile,
    lower_triangle,
    matrix_of,
    number_of,
    optional_matrix_of,
    optional_vector_of,
    place,
    place_after,
    result_of,
    results_of,
    row_of,
    store_tile,
    transposed,
)
from fastkm._linalg.triton.vectors import add_vector_to_diagonal, load_cotangent, load_vector, store_vector


class Cotangents(NamedTuple):
    """Cotangents of what an update returns; None stands for zero."""

    mean: Any
    cov: Any
    s: Any
    kl: Any
    log_evidence: Any


class Gradients(NamedTuple):
    """Cotangents of what an update is given. While it runs, those of the weights and values hold other things too."""

    mean: Any
    cov: Any
    weights: Any
    z: Any
    noise: Any


class Parts(NamedTuple):
    """The workspace of one memory."""

    lower: Any  # S, then Lᵀ [T, T]
    inverse: Any  # L⁻¹ [T, T]
    x: Any  # [T, T]
    y: Any  # [T, T]
    weights: Any  # W [T, K], zero where masked
    projected: Any  # V = W U [T, K]
    gain: Any  # G = L⁻¹ V [T, K]
    to_projected: Any  # Ḡ, then V̄ [T, K]
    error: Any  # E [T, C]
    residual: Any  # Z − W R, then Z̄ [T, C]
    to_explained: Any  # p̄, the cotangents of wᵀUw [1, T]
    end: Any


@triton.jit
def update_backward_layout(p, T, K, C, ld):
    lower = place(p, T, T, ld)
    inverse = place_after(lower, T, T, ld)
    x = place_after(inverse, T, T, ld)
    y = place_after(x, T, T, ld)
    weights = place_after(y, T, K, K)
    projected = place_after(weights, T, K, K)
    gain = place_after(projected, T, K, K)
    to_projected = place_after(gain, T, K, K)
    error = place_after(to_projected, T, C, C)
    residual = place_after(error, T, C, C)
    to_explained = place_after(residual, 1, T, T)
    end = end_of(to_explained)
    return Parts(lower, inverse, x, y, weights, projected, gain, to_projected, error, residual, to_explained, end)


@triton.jit
def update_backward_kernel(
    mean, cov, patterns, grads, to, workspaces, K, C, T, ld,
    REMOVES: tl.constexpr, PRECISION: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """All patterns as one chunk. With bars for cotangents and primes for what is after the update:

    Ḡ = E R̄'ᵀ − 2 G Ū'        Ē = G R̄' + 2 diag(ē) E        V̄ = L⁻ᵀ Ḡ        Z̄ = L⁻ᵀ Ē
    L̄ = −tril(V̄ Gᵀ + Z̄ Eᵀ)        S̄ = L⁻ᵀ (Φ(Lᵀ L̄) + diag(L_tt² p̄_t)) L⁻¹, symmetric
    V̄ += S̄ W        W̄ = S̄ V − Z̄ Rᵀ + V̄ U        R̄ = R̄' − WᵀZ̄        Ū = Ū' + sym(WᵀV̄)

    p̄_t is the cotangent of w_tᵀUw_t = L_tt² − σ_t². σ_t² enters S_tt and leaves that difference again: S̄_tt − p̄_t
    reaches it. At a small step that is far less than p̄_t, which is therefore left out of the sum S̄_tt.

    REMOVES: the same for −U, −Ū' and −Ū. A removal has no p̄ and no ē.

    Bytes moved: at least the inputs and cotangents in and the gradients out, each once. The products read their
    operands from the workspace, which stays in the cache up to preset L.
    """
    i_b = tl.program_id(0).to(tl.int64)
    mean, cov = matrix_of(mean, i_b, K, C), matrix_of(cov, i_b, K, K)
    patterns = patterns_of(patterns, i_b, T, K, C, False)
    evidence = 0.0
    if grads.log_evidence is not None:
        evidence = number_of(grads.log_evidence, i_b)
    grads = Cotangents(
        optional_matrix_of(grads.mean, i_b, K, C),
        optional_matrix_of(grads.cov, i_b, K, K),
        optional_vector_of(grads.s, i_b, T),
        optional_vector_of(grads.kl, i_b, T),
        evidence,
    )
    to = Gradients(
        result_of(to.mean, i_b, K, C),
        result_of(to.cov, i_b, K, K),
        result_of(to.weights, i_b, T, K),
        result_of(to.z, i_b, T, C),
        results_of(to.noise, i_b, T),
    )
    parts = update_backward_layout(workspaces.p + i_b * workspaces.s_b, T, K, C, ld)
    copy_patterns(parts.weights, patterns.weights, patterns.mask)
    copy_patterns(parts.residual, patterns.z, patterns.mask)
    copy_or_zero(to.mean, grads.mean)
    tl.debug_barrier()

    SIGN: tl.constexpr = -1.0 if REMOVES else 1.0
    update_again(parts, mean, cov, patterns.noise, SIGN, PRECISION, SINGLE)
    back_through_state(to, parts, grads.cov, SIGN, PRECISION)
    back_through_report(to, parts, patterns, grads)
    back_through_whitening(to, parts, PRECISION)
    back_through_factor(parts)
    back_through_pivots(to.noise, parts, patterns.mask, grads.s)
    back_to_arguments(to, parts, mean, cov, grads.cov, SIGN, PRECISION)
    clear_masked(to, parts.residual, patterns.mask)


@triton.jit
def update_again(parts, mean, cov, noise, SIGN: tl.constexpr, PRECISION: tl.constexpr, SINGLE: tl.constexpr):
    """V, S, L, G and E of the update of SIGN · U."""
    product(parts.projected, parts.weights, cov, scale=SIGN)
    product(parts.lower, parts.projected, transposed(parts.weights))
    add_vector_to_diagonal(parts.lower, noise)
    factor(parts.lower, parts.inverse, SINGLE)
    product(parts.gain, parts.inverse, parts.projected)
    product(parts.residual, parts.weights, mean, scale=-1.0, accumulate=True, precision=PRECISION)
    product(parts.error, parts.inverse, parts.residual)


@triton.jit
def back_through_state(to, parts, grad_cov, SIGN: tl.constexpr, PRECISION: tl.constexpr):
    """Ḡ, and what of Ē comes through the mean, in the place of the values' gradient."""
    product(parts.to_projected, parts.error, transposed(to.mean), precision=PRECISION)
    if len(grad_cov) != 0:
        product(parts.to_projected, parts.gain, grad_cov, scale=-SIGN, accumulate=True)
        product(parts.to_projected, parts.gain, transposed(grad_cov), scale=-SIGN, accumulate=True)
    product(to.z, parts.gain, to.mean, precision=PRECISION)


@triton.jit
def back_through_report(to, parts, patterns, grads):
    """Ē, the noise's gradient but for S̄, and p̄. Ends with a barrier."""
    T, C = parts.error.rows, parts.error.columns
    for t in range(0, T, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        m_written = is_written(patterns.mask, o_t, T)
        noise = load_vector(patterns.noise, o_t, 1.0)
        explained = find_explained(parts, o_t)
        s = explained + noise
        beta = explained / s
        grad_kl = tl.where(m_written, load_cotangent(grads.kl, o_t), 0.0)
        grad_evidence = tl.where(m_written, grads.log_evidence, 0.0)
        grad_energy = 0.5 * (grad_kl * beta - grad_evidence)
        energy = tl.zeros((BLOCK,), tl.float32)
        for c in range(0, C, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            error = load_tile(parts.error, o_t, o_c)
            energy += tl.sum(error * error, 1)
            store_tile(to.z, load_tile(to.z, o_t, o_c) + 2 * grad_energy[:, None] * error, o_t, o_c)
        to_s = load_cotangent(grads.s, o_t) - 0.5 * grad_evidence * C / s
        of_kl = 0.5 * grad_kl / s
        to_explained = to_s + of_kl * (C * beta + energy * (noise / s))
        store_vector(row_of(parts.to_explained, 0), tl.where(m_written & (explained > 0), to_explained, 0.0), o_t)
        store_vector(to.noise, to_s - of_kl * beta * (C * (explained / noise) + energy), o_t)
    tl.debug_barrier()


@triton.jit
def find_explained(parts, o_t):
    """w_tᵀ U_{t−1} w_t = L_tt G_t · w_t, which L_tt² − σ² would give without its digits; not below zero."""
    total = tl.zeros(o_t.shape, tl.float32)
    for k in range(0, parts.gain.columns, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        total += tl.sum(load_tile(parts.gain, o_t, o_k) * load_tile(parts.weights, o_t, o_k), 1)
    return tl.maximum(load_diagonal(parts.lower, o_t, 1.0) * total, 0.0)


@triton.jit
def back_through_whitening(to, parts, PRECISION: tl.constexpr):
    """V̄, in the place of the weights' gradient, Z̄, and L̄ in y; clears Lᵀ below its diagonal. Ends with a barrier."""
    product(to.weights, transposed(parts.inverse), parts.to_projected)
    product(parts.residual, transposed(parts.inverse), to.z)
    product(parts.y, to.weights, transposed(parts.gain), scale=-1.0)
    product(parts.y, parts.residual, transposed(parts.error), scale=-1.0, accumulate=True, precision=PRECISION)
    T = parts.lower.rows
    for t in range(0, T, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        for j in range(0, T, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            to_lower = tl.where(lower_triangle(o_t, o_j), load_tile(parts.y, o_t, o_j), 0.0)
            upper = load_tile(parts.lower, o_t, o_j)
            tl.debug_barrier()
            store_tile(parts.y, to_lower, o_t, o_j)
            store_tile(parts.lower, tl.where(o_t[:, None] <= o_j[None, :], upper, 0.0), o_t, o_j)
    tl.debug_barrier()


@triton.jit
def back_through_factor(parts):
    """S̄ in y: the lower triangle of Lᵀ L̄, halved and mirrored, between L⁻ᵀ and L⁻¹."""
    product(parts.x, parts.lower, parts.y, scale=0.5)
    mirror_lower(parts.y, parts.x)
    product(parts.x, transposed(parts.inverse), parts.y)
    product(parts.y, parts.x, parts.inverse)


@triton.jit
def back_through_pivots(to_noise, parts, mask, grad_s):
    """Add L⁻ᵀ diag(L_tt² p̄_t) L⁻¹ to S̄ in y, and S̄_tt − p̄_t to the noise's gradient.

    A masked pattern returns its noise as s, and nothing else comes from it.
    """
    T = parts.y.rows
    for t in range(0, T, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        total = load_vector(to_noise, o_t) + load_diagonal(parts.y, o_t, 0.0)
        for i in range(0, T, BLOCK):
            o_i = i + tl.arange(0, BLOCK)
            l_ii = load_diagonal(parts.lower, o_i, 0.0)
            inverse = load_tile(parts.inverse, o_i, o_t)
            scaled = (l_ii * l_ii * load_vector(row_of(parts.to_explained, 0), o_i))[:, None] * inverse
            total += tl.sum(tl.where(o_i[:, None] > o_t[None, :], scaled * inverse, 0.0), 0)
            store_tile(parts.x, scaled, o_i, o_t)
        direct = load_cotangent(grad_s, o_t)
        store_vector(to_noise, tl.where(is_written(mask, o_t, T), total, direct), o_t)
    tl.debug_barrier()
    product(parts.y, transposed(parts.inverse), parts.x, accumulate=True)


@triton.jit
def back_to_arguments(to, parts, mean, cov, grad_cov, SIGN: tl.constexpr, PRECISION: tl.constexpr):
    """V̄ += S̄ W, then W̄, R̄ and Ū."""
    product(to.weights, parts.y, parts.weights, accumulate=True)
    copy(parts.to_projected, to.weights)
    tl.debug_barrier()
    product(to.weights, parts.y, parts.projected)
    product(to.weights, parts.residual, transposed(mean), scale=-1.0, accumulate=True, precision=PRECISION)
    product(to.weights, parts.to_projected, cov, scale=SIGN, accumulate=True)
    product(to.mean, transposed(parts.weights), parts.residual, scale=-1.0, accumulate=True, precision=PRECISION)
    copy_or_zero(to.cov, grad_cov)
    tl.debug_barrier()
    product(to.cov, transposed(parts.weights), parts.to_projected, scale=0.5 * SIGN, accumulate=True)
    product(to.cov, transposed(parts.to_projected), parts.weights, scale=0.5 * SIGN, accumulate=True)


@triton.jit
def clear_masked(to, to_values, mask):
    """Store the values' gradient. Nothing flows back to a masked pattern."""
    T = to_values.rows
    for t in range(0, T, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        m_written = is_written(mask, o_t, T)
        for k in range(0, to.weights.columns, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            store_tile(to.weights, tl.where(m_written[:, None], load_tile(to.weights, o_t, o_k), 0.0), o_t, o_k)
        for c in range(0, to.z.columns, BLOCK):
            o_c = c + tl.arange(0, BLOCK)
            store_tile(to.z, tl.where(m_written[:, None], load_tile(to_values, o_t, o_c), 0.0), o_t, o_c)


def launch_backward(
    mean: Tensor, cov: Tensor, patterns: Patterns, grads: Cotangents, precision: int, *, removes: bool
) -> Gradients:
    """The gradient of an update, or of a removal."""
    (B, K, C), T = mean.shape, patterns.weights.p.shape[1]
    shapes = (x.shape for x in (mean, cov, patterns.weights.p, patterns.z.p, patterns.noise.p))
    to = Gradients(*(mean.new_empty(shape) for shape in shapes))
    if not B:
        return to
    ld = row_stride(T)
    update_backward_kernel[(B,)](
        matrices(mean), matrices(cov), patterns, grads, to, workspace(mean, B, update_backward_layout, T, K, C, ld),
        K, C, T, ld, REMOVES=removes, PRECISION=precision_of(precision), **factoring(T),
    )  # fmt: skip
    return to


@implements("update_posterior_backward")
def update_backward(
    mean, cov, weights, values, noise_var, mask, precision,
    grad_mean, grad_cov, grad_innovation_var, grad_kl, grad_log_evidence,
):  # fmt: skip
    patterns = Patterns(matrices(weights), matrices(values), vectors(noise_var), mask_vectors(mask))
    grads = Cotangents(
        matrices(grad_mean),
        matrices(grad_cov),
        vectors(grad_innovation_var),
        vectors(grad_kl),
        None if grad_log_evidence is None else numbers(grad_log_evidence),
    )
    return tuple(launch_backward(mean, cov, patterns, grads, precision, removes=False))
