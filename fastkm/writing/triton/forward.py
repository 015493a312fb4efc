"""Forward kernel of write.

One program a memory searches in Gram space. As it conditions the covariance on every pattern it finds, it is the factor
phase of the update too; what is left is the apply phase. Up to ``LARGEST_TILE`` rows both are one launch, in which the
inverse of G + λI, that matrix and the covariance stay in registers.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastkm._linalg.triton.condition import apply_pattern_by_pattern, launch_apply, report_patterns
from fastkm._linalg.triton.factor import EPS, IS_INDEFINITE, IS_LOST, factor, holds_variance, load_symmetric
from fastkm._linalg.triton.launch import (
    LARGEST_TILE,
    blocks_of,
    factoring,
    implements,
    mask_vectors,
    matrices,
    numbers,
    precision_of,
    row_stride,
    rows_aligned,
    vectors,
    workspace,
)
from fastkm._linalg.triton.patterns import Patterns, patterns_of, starts_chunk
from fastkm._linalg.triton.product import product
from fastkm._linalg.triton.tiles import (
    BLOCK,
    add_to_diagonal,
    assume_aligned,
    assume_fours,
    copy,
    end_of,
    load_diagonal,
    load_tile,
    matrix_of,
    number_of,
    place,
    place_after,
    result_of,
    results_of,
    row_of,
    store_tile,
    transposed,
)
from fastkm._linalg.triton.vectors import (
    add_symmetric_outer,
    load_entry,
    load_vector,
    product_with_vector,
    share_vector,
    store_vector,
)
from fastkm.writing.triton.search import (
    Attempt,
    Change,
    Gram,
    System,
    advance_cross,
    factor_attempt,
    find_change,
    find_inner_products,
    move_gram,
    search_options,
    solve_attempt,
)


class Results(NamedTuple):
    """What write returns."""

    mean: Any
    cov: Any
    weights: Any
    s: Any
    kl: Any
    status: Any


class Found(NamedTuple):
    """What the search finds of each pattern of one memory."""

    weights: Any  # [T, K]
    s: Any  # [T]
    explained: Any  # w·a [T]
    gain: Any  # a/√s [T, K]


class Parts(NamedTuple):
    """The workspace of one memory."""

    gram: Any
    system: Any
    cov: Any  # U while the search refactors [K, K]
    vectors: Any  # [4, K]
    end: Any


@triton.jit
def write_layout(p, K, C, T, ld, REFACTOR: tl.constexpr):
    gram = place(p, K, K, ld)
    lower = place_after(gram, K, K, ld)
    inverse = place_after(lower, K, K, ld)
    cross = place_after(inverse, T, K, ld)
    inner = place_after(cross, T, T, T)
    values = place_after(inner, T, C, C)
    if REFACTOR:
        moved = place_after(values, K, K, ld)
        cov = place_after(moved, K, K, ld)
        vectors = place_after(cov, 4, K, ld)
    else:
        moved, cov, vectors = gram, gram, place_after(values, 4, K, ld)
    system = System(moved, lower, inverse)
    return Parts(Gram(gram, cross, inner, values), system, cov, vectors, end_of(vectors))


@triton.jit
def write_kernel(
    mean, cov, patterns, ridge, to, p_gain, p_energy, workspaces, K, C, T, ld, tiles, num_opt_iters,
    ALIGNED: tl.constexpr, REFACTOR: tl.constexpr, APPLY: tl.constexpr, SQUARED: tl.constexpr,
    SINGLE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Find the weights of every pattern, and, with APPLY, condition the mean on them.

    Bytes moved: mean, cov, values and noise in, mean, cov, weights, variances and divergences out, once each, and the
    mean and values again from the cache for the apply phase. The inner products lie in the workspace.
    """
    C, mean = assume_fours(C, ALIGNED), assume_aligned(mean, ALIGNED)
    i_b = tl.program_id(0).to(tl.int64)
    patterns = patterns_of(patterns, i_b, T, K, C, ALIGNED)
    mean, cov, ridge = matrix_of(mean, i_b, K, C), matrix_of(cov, i_b, K, K), number_of(ridge, i_b)
    new_cov, weights = result_of(to.cov, i_b, K, K), result_of(to.weights, i_b, T, K)
    s, gain = results_of(to.s, i_b, T), result_of(p_gain, i_b, T, K)
    found = Found(weights, s, results_of(to.kl, i_b, T), gain)
    parts = write_layout(workspaces.p + i_b * workspaces.s_b, K, C, T, ld, REFACTOR)
    find_inner_products(parts.gram, mean, patterns)
    if REFACTOR:
        status = load_symmetric(parts.cov, cov)
        status = search_refactoring(found, parts, patterns.noise, ridge, num_opt_iters, status, SQUARED, SINGLE, SIZE)
        copy(new_cov, parts.cov)
    else:
        good = invert_system(parts, mean, ridge, SINGLE)
        status = search_in_registers(found, new_cov, parts, cov, patterns.noise, ridge, SIZE)
        status = tl.where((status == 0) & (good == 0), IS_INDEFINITE, status)
    tl.store(to.status + i_b, status)
    if APPLY:
        new_mean, energy = result_of(to.mean, i_b, K, C), result_of(p_energy, i_b, tiles, T)
        patterns = Patterns(weights, patterns.z, patterns.noise, patterns.mask)
        tl.debug_barrier()
        for j in range(tiles):
            apply_pattern_by_pattern(new_mean, mean, patterns, s, gain, row_of(energy, j), j * BLOCK, SIZE)
        tl.debug_barrier()
        report_patterns(results_of(to.kl, i_b, T), None, patterns, s, energy, C)


# ------------------------------------------------------------------------------------------- one solve for each pattern


@triton.jit
def invert_system(parts, mean, ridge, SINGLE: tl.constexpr):
    """H = A⁻¹ = L⁻ᵀ L⁻¹ in the place of L, and A = G + λI in that of G. Returns whether A is positive definite."""
    system = parts.system
    product(system.lower, mean, transposed(mean))
    add_to_diagonal(system.lower, ridge)
    _, good = factor(system.lower, system.inverse, SINGLE)
    product(system.lower, transposed(system.inverse), system.inverse)
    add_to_diagonal(parts.gram.gram, ridge)
    return good


@triton.jit
def search_in_registers(found, new_cov, parts, cov, noise, ridge, SIZE: tl.constexpr):
    """One solve a pattern, and no factorisation after the first. Returns the status. Ends with a barrier.

    With w exact, R δ = λ w, so A = G + λI changes by [c w] [[δ·δ, λ], [λ, 0]] [c w]ᵀ. Its inverse H follows by
    Woodbury. What H has lost to rounding, one step of refinement against A gives back to w. A and U stay in memory
    unless the registers have room for them beside H (HOLD).
    """
    HOLD: tl.constexpr = SIZE <= 64
    K, T = cov.rows, noise.size
    o = tl.arange(0, SIZE)
    system, buffer = parts.gram.gram, row_of(parts.vectors, 2)
    b_inverse = load_tile(parts.system.lower, o, o)
    status = load_symmetric(new_cov, cov)
    variances = load_diagonal(new_cov, o, 0.0)
    variances_before = variances
    if HOLD:
        b_system, b_cov = load_tile(system, o, o), load_tile(new_cov, o, o)
        tl.debug_barrier()
    for t in range(T):
        # w = H x, refined once, and a = U w.
        x = load_vector(row_of(parts.gram.cross, t), o)
        w = tl.sum(b_inverse * x[:, None], 0)
        if HOLD:  # noqa: SIM108  decided when the kernel is compiled
            residual = x - tl.sum(b_system * w[:, None], 0)
        else:
            residual = x - product_with_vector(buffer, system, w)
        w += tl.sum(b_inverse * residual[:, None], 0)
        if HOLD:  # noqa: SIM108
            a = tl.sum(b_cov * w[:, None], 0)
        else:
            a = product_with_vector(buffer, new_cov, w)

        # s, and the change c δᵀ of the mean.
        b_noise = load_entry(noise, t)
        explained = tl.sum(w * a, 0)
        slack = (tl.sum(tl.abs(w * a), 0) + b_noise) * (4.0 * EPS) * (K + T)
        holds = (explained >= -slack) & (explained < float("inf"))
        status = tl.where((status == 0) & (holds == 0), IS_INDEFINITE, status)
        explained = tl.where(holds & (explained > 0), explained, 0.0)
        s = explained + b_noise
        variances_before = tl.where(starts_chunk(t), variances, variances_before)
        held = holds_variance(tl.sum(w * w * variances_before, 0), explained, b_noise, s)
        status = tl.where((status == 0) & (held == 0), IS_LOST, status)
        c, gain = a / s, a / tl.sqrt(s)
        variances -= gain * gain
        inner = load_entry(row_of(parts.gram.inner, t), t)
        delta_delta = inner - tl.sum(w * x, 0) - ridge * tl.sum(w * w, 0)

        # H, A and U follow.
        b_inverse = correct_inverse(b_inverse, w, c, delta_delta, ridge)
        if HOLD:
            along_c = ridge * w + delta_delta * c
            b_system += c[:, None] * along_c[None, :] + (ridge * w)[:, None] * c[None, :]
            b_cov -= gain[:, None] * gain[None, :]
        else:
            correct_in_memory(system, new_cov, parts.vectors, w, c, gain, delta_delta, ridge)
        store_vector(row_of(found.weights, t), w, o)
        store_vector(row_of(found.gain, t), gain, o)
        tl.store(found.s.p + t, s)
        tl.store(found.explained.p + t, explained)
        advance_cross(parts.gram.cross, parts.gram.inner, None, t, w, c)
    if HOLD:
        store_tile(new_cov, b_cov, o, o)
    tl.debug_barrier()
    return status


@triton.jit
def correct_inverse(inverse, w, c, delta_delta, ridge):
    """Woodbury: H −= [p q] N⁻¹ [p q]ᵀ with p = H c, q = H w, N = [[δ·δ, λ], [λ, 0]]⁻¹ + [c w]ᵀ H [c w]."""
    p, q = tl.sum(inverse * c[:, None], 0), tl.sum(inverse * w[:, None], 0)
    n11, n12 = tl.sum(c * p, 0), tl.sum(c * q, 0) + 1 / ridge
    n22 = tl.sum(w * q, 0) - delta_delta / (ridge * ridge)
    determinant = n11 * n22 - n12 * n12
    e, f = (n22 * p - n12 * q) / determinant, (n11 * q - n12 * p) / determinant
    return inverse - (p[:, None] * e[None, :] + q[:, None] * f[None, :])


@triton.jit
def correct_in_memory(system, cov, vectors, w, c, gain, delta_delta, ridge):
    """A += λ (c wᵀ + w cᵀ) + δ·δ c cᵀ and U −= g gᵀ. Ends with a barrier."""
    o = tl.arange(0, w.shape[0])
    first, second = row_of(vectors, 0), row_of(vectors, 1)
    share_vector(first, w, o)
    share_vector(second, c, o)
    add_symmetric_outer(system, 2 * ridge, second, first)
    add_symmetric_outer(system, delta_delta, second, second)
    share_vector(first, gain, o)
    add_symmetric_outer(cov, -1.0, first, first)


# --------------------------------------------------------------------------------------- a factorisation for each solve


@triton.jit
def search_refactoring(
    found, parts, noise, ridge, num_opt_iters, status, SQUARED: tl.constexpr, SINGLE: tl.constexpr, SIZE: tl.constexpr
):
    """Every solve factors anew: for the squared-Gram solve, several solves a pattern, and large memories."""
    gram, cov, vectors = parts.gram.gram, parts.cov, parts.vectors
    K, T = cov.rows, noise.size
    o = tl.arange(0, SIZE)
    last_c, last_r, buffer, last_gain = row_of(vectors, 0), row_of(vectors, 1), row_of(vectors, 2), row_of(vectors, 3)
    variances = load_diagonal(cov, o, 0.0)
    variances_before = variances
    for t in range(T):
        x, b_noise = load_vector(row_of(parts.gram.cross, t), o), load_entry(noise, t)
        inner = load_entry(row_of(parts.gram.inner, t), t)
        zero, zeros = tl.full((), 0, tl.float32), tl.zeros((SIZE,), tl.float32)
        w, change = zeros, Change(zeros, zero, zero, zeros, zeros, zero, zero)
        for n in range(num_opt_iters):
            before = Attempt(last_c, last_r, change.delta_z, change.delta_delta)
            target, good = factor_attempt(parts.system, gram, x, before, n > 0, ridge, SQUARED, SINGLE)
            status = tl.where((status == 0) & (good == 0), IS_INDEFINITE, status)
            _, w = solve_attempt(parts.system, target, buffer, SQUARED)
            change = find_change(gram, cov, buffer, x, w, inner, b_noise)
            product_wa = w * change.a
            least = -tl.sum(tl.abs(product_wa), 0) * (4.0 * EPS) * (K + T)
            holds = (change.s < float("inf")) & (change.explained >= least)
            status = tl.where((status == 0) & (holds == 0), IS_INDEFINITE, status)
            share_vector(last_c, change.c, o)
            share_vector(last_r, change.r, o)
        gain, explained = change.a / tl.sqrt(change.s), tl.maximum(change.explained, 0.0)
        variances_before = tl.where(starts_chunk(t), variances, variances_before)
        held = holds_variance(tl.sum(w * w * variances_before, 0), explained, b_noise, change.s)
        status = tl.where((status == 0) & (held == 0), IS_LOST, status)
        variances -= gain * gain
        move_gram(gram, last_c, last_r, change.delta_delta, 1.0)
        share_vector(last_gain, gain, o)
        add_symmetric_outer(cov, -1.0, last_gain, last_gain)
        store_vector(row_of(found.weights, t), w, o)
        store_vector(row_of(found.gain, t), gain, o)
        tl.store(found.s.p + t, change.s)
        tl.store(found.explained.p + t, explained)
        advance_cross(parts.gram.cross, parts.gram.inner, None, t, w, change.c)
    return status


# ------------------------------------------------------------------------------------------------------------ launcher


def can_search_in_registers(rows: int, num_opt_iters: int, squared_gram: bool) -> bool:
    return rows <= LARGEST_TILE and num_opt_iters == 1 and not squared_gram


@implements("write")
def write_launcher(mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, precision):
    (B, K, C), T, ld = mean.shape, values.shape[1], row_stride(mean.shape[1])
    to = Results(
        mean.new_empty(mean.shape),
        mean.new_empty(cov.shape),
        mean.new_empty(B, T, K),
        mean.new_empty(B, T),
        mean.new_empty(B, T),
        mean.new_empty(B, dtype=torch.int32),
    )
    if not B:
        return tuple(to)
    refactor = not can_search_in_registers(K, num_opt_iters, squared_gram)
    apply = K <= LARGEST_TILE and precision_of(precision) == "ieee"
    tiles = max(1, blocks_of(C))
    gain, energy = mean.new_empty(B, T, K), mean.new_empty(B, tiles, T)
    patterns = Patterns(None, matrices(values), vectors(noise_var), mask_vectors(mask))
    write_kernel[(B,)](
        matrices(mean), matrices(cov), patterns, numbers(ridge), to, gain, energy,
        workspace(mean, B, write_layout, K, C, T, ld, refactor), K, C, T, ld, tiles, num_opt_iters,
        ALIGNED=rows_aligned(mean, values), REFACTOR=refactor, APPLY=apply, SQUARED=squared_gram,
        **factoring(K) | search_options(K, refactor or K % 16 != 0),
    )  # fmt: skip
    if not apply:
        patterns = patterns._replace(weights=matrices(to.weights))
        launch_apply(mean, patterns, to.mean, to.s, to.kl, None, gain, precision)
    return tuple(to)
