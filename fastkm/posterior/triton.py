"""Triton kernels of update_posterior.

Up to ``LARGEST_TILE`` rows a memory is computed in registers: its covariance, and then one tile of its mean after the
other, stay there while the patterns pass by one at a time. That is one launch with a program a memory, or, for few
memories, a factor phase and an apply phase parallel over tiles of columns. Larger memories, and products that may use
tensor cores, take the block form with chunks of 16 patterns, in the same two phases.

Both phases use G = L⁻¹ W U [T, K] and E = L⁻¹ (Z − W R) [T, C]:  R' = R + GᵀE,  U' = U − GᵀG.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import fastkm._linalg.triton.condition_backward  # noqa: F401  implements the gradient
from fastkm._linalg.triton.condition import apply_pattern_by_pattern, launch_apply, report_patterns
from fastkm._linalg.triton.factor import (
    EPS,
    IS_ASYMMETRIC,
    IS_INDEFINITE,
    IS_LOST,
    IS_NOT_WRITTEN,
    IS_UNTOLD,
    LEAST_LEFT,
    SQRT_EPS,
    SQRT_LEAST_LEFT,
    eliminate,
    holds_variance,
    inverse_of_factor,
    load_symmetric,
)
from fastkm._linalg.triton.launch import (
    LARGEST_TILE,
    WARPS,
    blocks_of,
    implements,
    mask_vectors,
    matrices,
    padded,
    precision_of,
    rows_aligned,
    vectors,
    warps,
)
from fastkm._linalg.triton.patterns import CHUNK, Patterns, is_written, load_patterns, patterns_of, starts_chunk
from fastkm._linalg.triton.product import product
from fastkm._linalg.triton.tiles import (
    BLOCK,
    assume_aligned,
    assume_fours,
    diagonal,
    load_diagonal,
    load_tile,
    matrix_of,
    result_of,
    results_of,
    row_of,
    rows_from,
    store_tile,
    transposed,
)
from fastkm._linalg.triton.vectors import load_entry, load_vector, store_vector
from fastkm._runtime.autograd import differentiable

# Fewer memories than this do not fill a chip, so their columns are spread over it.
FEW_MEMORIES = 64


class Results(NamedTuple):
    """What an update returns."""

    mean: Any
    cov: Any
    s: Any
    kl: Any
    log_evidence: Any
    status: Any


# -------------------------------------------------------------------------------------------------------- in registers


@triton.jit
def factor_pattern_by_pattern(to, s, explained, gain, cov, patterns, SIZE: tl.constexpr):
    """U through all patterns:  a = U w,  s = wᵀa + σ²,  g = a/√s,  U ← U − g gᵀ.  Ends with a barrier.

    ``explained`` is wᵀa. The status is that of the block form, which rounds at the size of U before its chunk.
    """
    K, T = cov.rows, s.size
    o_k = tl.arange(0, SIZE)
    b_cov = load_tile(cov, o_k, o_k)
    gap, scale = tl.max(tl.abs(b_cov - load_tile(transposed(cov), o_k, o_k))), tl.max(tl.abs(b_cov))
    finite = tl.min((tl.abs(b_cov) < float("inf")).to(tl.int32))
    status = tl.where(finite == 0, IS_INDEFINITE, tl.where(gap > scale * SQRT_EPS, IS_ASYMMETRIC, 0))
    variances = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_cov, 0.0), 0)
    variances_before = variances
    for t in range(T):
        o_t = t + tl.arange(0, 1)
        w = tl.sum(load_patterns(patterns.weights, o_t, o_k, is_written(patterns.mask, o_t, T)), 0)
        variances_before = tl.where(starts_chunk(t), variances, variances_before)
        noise = load_entry(patterns.noise, t)
        a = tl.sum(b_cov * w[:, None], 0)
        b_explained = tl.sum(w * a, 0)
        slack = (tl.sum(tl.abs(w * a), 0) + noise) * (4.0 * EPS) * (K + T)
        holds = (b_explained >= -slack) & (b_explained < float("inf"))
        status = tl.where((status == 0) & (holds == 0), IS_INDEFINITE, status)
        b_explained = tl.where(holds & (b_explained > 0), b_explained, 0.0)
        b_s = b_explained + noise
        held = holds_variance(tl.sum(w * w * variances_before, 0), b_explained, noise, b_s)
        status = tl.where((status == 0) & (held == 0), IS_LOST, status)
        g = a / tl.sqrt(b_s)
        variances -= g * g
        b_cov -= g[:, None] * g[None, :]
        tl.store(s.p + t, b_s)
        tl.store(explained.p + t, b_explained)
        store_vector(row_of(gain, t), g, o_k)
    store_tile(to, b_cov, o_k, o_k)
    tl.debug_barrier()
    return status


@triton.jit
def update_kernel(
    mean, cov, patterns, to, p_gain, p_energy, p_ticket, K, C, T, tiles,
    FACTOR: tl.constexpr, SPLIT: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The whole update of a memory; SPLIT: its factor phase only, or with FACTOR off one tile of its apply phase.

    Bytes moved: mean and cov in and out once, weights, values and noise in once; T (K + tiles) numbers of workspace,
    and the weights and gains again from the cache for every tile of columns.
    """
    C, mean = assume_fours(C, ALIGNED), assume_aligned(mean, ALIGNED)
    i = tl.program_id(0)
    i_tile = 0
    if SPLIT and not FACTOR:
        i_tile = i % tiles
        i = i // tiles
    i_b = i.to(tl.int64)
    patterns = patterns_of(patterns, i_b, T, K, C, ALIGNED)
    s, gain = results_of(to.s, i_b, T), result_of(p_gain, i_b, T, K)
    if FACTOR:
        new_cov = result_of(to.cov, i_b, K, K)
        kl = results_of(to.kl, i_b, T)
        status = factor_pattern_by_pattern(new_cov, s, kl, gain, matrix_of(cov, i_b, K, K), patterns, SIZE)
        tl.store(to.status + i_b, status)
    if not (SPLIT and FACTOR):
        mean, new_mean = matrix_of(mean, i_b, K, C), result_of(to.mean, i_b, K, C)
        energy = result_of(p_energy, i_b, tiles, T)
        last = i_tile + 1 if SPLIT else tiles
        for j in range(i_tile, last):
            apply_pattern_by_pattern(new_mean, mean, patterns, s, gain, row_of(energy, j), j * BLOCK, SIZE)
        tl.debug_barrier()
        done = True
        if SPLIT:
            done = tl.atomic_add(p_ticket + i_b, 1, sem="acq_rel") == tiles - 1
        if done:
            report_patterns(results_of(to.kl, i_b, T), to.log_evidence + i_b, patterns, s, energy, C)


# ---------------------------------------------------------------------------------------------------------- block form


@triton.jit
def factor_kernel(cov, patterns, p_new_cov, p_s, p_explained, p_status, p_gain, K, T, REMOVES: tl.constexpr):
    """Chunk by chunk:  V = W U,  S = V Wᵀ + diag σ² = L Lᵀ,  G = L⁻¹ V,  U ← U − GᵀG.

    REMOVES: the same for −U, so V = −W U and U ← U + GᵀG. A removal does not report what U explains.

    Bytes moved: cov in and out once a chunk of patterns, from the cache while K² stays there; weights in once.
    """
    SIGN: tl.constexpr = 1.0 if REMOVES else -1.0
    i_b = tl.program_id(0).to(tl.int64)
    patterns = patterns_of(patterns, i_b, T, K, 0, False)
    new_cov, s, gain = result_of(p_new_cov, i_b, K, K), results_of(p_s, i_b, T), result_of(p_gain, i_b, T, K)
    status = load_symmetric(new_cov, matrix_of(cov, i_b, K, K))
    for first in range(0, T, CHUNK):
        count = tl.minimum(CHUNK, T - first)
        o_t = first + tl.arange(0, CHUNK)
        chunk_gain = rows_from(gain, first, T - first)
        noise = load_vector(patterns.noise, o_t, 1.0)
        predictive, variances = predict_chunk(chunk_gain, patterns, new_cov, o_t, REMOVES)

        o = tl.arange(0, CHUNK)
        if REMOVES:
            pivots, inverse, removed = factor_removal(predictive, variances, noise, K, count)
            status = tl.where(status == 0, removed, status)
        else:
            # L⁻¹. A positive definite U never lets wᵀUw fall below zero.
            slack = tl.abs(diagonal(predictive, o) + noise) * (4.0 * EPS) * (K + T)
            tile, good, rests = eliminate(predictive, count, noise, slack, True)
            status = tl.where((status == 0) & (good == 0), IS_INDEFINITE, status)
            pivots = diagonal(tile, o)
            held = (o >= count) | holds_variance(variances, rests, noise, pivots)
            status = tl.where((status == 0) & (tl.min(held.to(tl.int32), 0) == 0), IS_LOST, status)
            store_vector(results_of(p_explained, i_b, T), rests, o_t)
            inverse = inverse_of_factor(tile, pivots, o)
        store_vector(s, pivots, o_t)
        whiten_rows(chunk_gain, inverse)
        chunk_gain = rows_from(gain, first, count)
        product(new_cov, transposed(chunk_gain), chunk_gain, scale=SIGN, accumulate=True)
    tl.store(p_status + i_b, status)


@triton.jit
def factor_removal(predictive, variances, noise, K, count):
    """L_tt², L⁻¹ and the status of S = diag σ² − W U Wᵀ, from −W U Wᵀ; see the reference's status of a removal."""
    o = tl.arange(0, CHUNK)
    tile = tl.where(o[:, None] == o[None, :], predictive + noise[:, None], predictive)
    tile, positive, _ = eliminate(tile, count, 0.0, 0.0, False)
    pivots = diagonal(tile, o)
    inverse = inverse_of_factor(tile, pivots, o)
    inverse_variance = tl.sum(inverse * inverse, 0)  # (S⁻¹)_tt
    size = tl.abs(variances) + noise
    definite = pivots - noise <= size * (4.0 * EPS) * (K + count)
    told = (size * inverse_variance * LEAST_LEFT <= 1.0) & (noise * inverse_variance * SQRT_LEAST_LEFT <= 1.0)
    status = tl.where(tl.min(told.to(tl.int32), 0) == 0, IS_UNTOLD, 0)
    status = tl.where(tl.min(definite.to(tl.int32), 0) == 0, IS_INDEFINITE, status)
    return pivots, inverse, tl.where(positive == 0, IS_NOT_WRITTEN, status)


@triton.jit
def predict_chunk(projected, patterns, cov, o_t, REMOVES: tl.constexpr):
    """V Wᵀ and Σ_k w_k² U_kk of one chunk of patterns; leaves V in ``projected``."""
    K = cov.rows
    o = tl.arange(0, CHUNK)
    m_written = is_written(patterns.mask, o_t, patterns.noise.size)
    variances = tl.zeros((CHUNK,), tl.float32)
    for k in range(0, K, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        total = tl.zeros((CHUNK, BLOCK), tl.float32)
        for j in range(0, K, CHUNK):
            o_j = j + tl.arange(0, CHUNK)
            b_weights = load_patterns(patterns.weights, o_t, o_j, m_written)
            total = tl.dot(b_weights, load_tile(cov, o_j, o_k), total, input_precision="ieee")
        if REMOVES:
            total = -total
        store_tile(projected, total, o, o_k)
    tl.debug_barrier()
    predictive = tl.zeros((CHUNK, CHUNK), tl.float32)
    for k in range(0, K, CHUNK):
        o_k = k + tl.arange(0, CHUNK)
        b_weights = load_patterns(patterns.weights, o_t, o_k, m_written)
        predictive = tl.dot(load_tile(projected, o, o_k), tl.trans(b_weights), predictive, input_precision="ieee")
        variances += tl.sum(b_weights * b_weights * load_diagonal(cov, o_k, 0.0)[None, :], 1)
    return predictive, variances


@triton.jit
def whiten_rows(x, inverse):
    """x ← L⁻¹ x for one chunk of rows, from L⁻¹ in registers. Ends with a barrier."""
    o = tl.arange(0, CHUNK)
    for k in range(0, x.columns, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        tile = tl.dot(inverse, load_tile(x, o, o_k), input_precision="ieee")
        tl.debug_barrier()
        store_tile(x, tile, o, o_k)
    tl.debug_barrier()


# ----------------------------------------------------------------------------------------------------------- launchers


@implements("update_posterior")
def update_posterior_launcher(
    mean: Tensor, cov: Tensor, weights: Tensor, values: Tensor, noise_var: Tensor, mask: Tensor | None, precision: int
):
    B, K, _ = mean.shape
    T = weights.shape[1]
    to = Results(
        mean.new_empty(mean.shape),
        mean.new_empty(cov.shape),
        mean.new_empty(B, T),
        mean.new_empty(B, T),
        mean.new_empty(B),
        mean.new_empty(B, dtype=torch.int32),
    )
    if not B:
        return tuple(to)
    patterns = Patterns(matrices(weights), matrices(values), vectors(noise_var), mask_vectors(mask))
    gain = mean.new_empty(B, T, K)
    if K <= LARGEST_TILE and precision_of(precision) == "ieee":
        launch_in_registers(mean, cov, patterns, to, gain)
    else:
        factor_kernel[(B,)](
            matrices(cov), patterns, to.cov, to.s, to.kl, to.status, gain, K, T, REMOVES=False, **warps(4)
        )
        launch_apply(mean, patterns, to.mean, to.s, to.kl, to.log_evidence, gain, precision)
    return tuple(to)


def launch_in_registers(mean: Tensor, cov: Tensor, patterns: Patterns, to: Results, gain: Tensor) -> None:
    """One launch, a program a memory; or, for few memories, a factor phase and a program for each tile of columns."""
    (B, K, C), T, size = mean.shape, gain.shape[1], padded(mean.shape[1])
    tiles = max(1, blocks_of(C))
    split = B < FEW_MEMORIES and tiles > 1
    energy, ticket = mean.new_empty(B, tiles, T), torch.zeros(B, dtype=torch.int32, device=mean.device)
    for phase in (True, False) if split else (True,):
        update_kernel[(B if phase else B * tiles,)](
            matrices(mean), matrices(cov), patterns, to, gain, energy, ticket, K, C, T, tiles,
            FACTOR=phase, SPLIT=split, ALIGNED=rows_aligned(mean, patterns.z.p), SIZE=size, **warps(WARPS[size]),
        )  # fmt: skip


update_posterior = differentiable(
    torch.ops.fastkm_triton.update_posterior.default, torch.ops.fastkm_triton.update_posterior_backward.default
)
