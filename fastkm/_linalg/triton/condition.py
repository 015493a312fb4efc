"""The apply phase of an update: the mean is conditioned on patterns whose weights and gains are known.

The factor phase leaves s [T], wᵀUw [T] and G = L⁻¹ W U [T, K] of every memory. With E = L⁻¹ (Z − W R) [T, C] the mean
becomes R' = R + GᵀE. Columns of R are independent, so one program may compute all of a memory or one tile of columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkm._linalg.triton.factor import invert_lower
from fastkm._linalg.triton.launch import blocks_of, matrices, precision_of, rows_aligned, warps
from fastkm._linalg.triton.patterns import CHUNK, Patterns, is_written, load_patterns, patterns_of
from fastkm._linalg.triton.tiles import (
    BLOCK,
    assume_aligned,
    assume_fours,
    load_tile,
    matrix_of,
    result_of,
    results_of,
    row_of,
    store_tile,
    transposed,
)
from fastkm._linalg.triton.vectors import load_entry, load_vector, store_vector, variance_divergence

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def report_patterns(kl, p_log_evidence, patterns, s, energy, C):
    """What is reported of each pattern, from its innovation variance s and its energy ‖E_t‖², a sum over ``energy``.

    KL_t = ½ [C (ln(s/σ²) − β) + β ‖E_t‖²] with β = wᵀUw/s. In the place of ``kl`` the factor phase has left wᵀUw. The
    evidence is left out if ``p_log_evidence`` is None.
    """
    log_evidence = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, s.size, CHUNK):
        o_t = first + tl.arange(0, CHUNK)
        m_t = o_t < s.size
        noise = load_vector(patterns.noise, o_t, 1.0)
        b_s = load_vector(s, o_t, 1.0)
        total = tl.zeros((CHUNK,), tl.float32)
        for i in range(energy.rows):
            # Past the first-level cache, which does not see the stores of other programs.
            total += tl.load(energy.p + i * energy.s_row + o_t, mask=m_t, other=0.0, cache_modifier=".cg")
        beta = load_vector(kl, o_t) / b_s
        store_vector(kl, 0.5 * (C * variance_divergence(noise / b_s, -beta) + beta * total), o_t)
        if p_log_evidence is not None:
            m_written = is_written(patterns.mask, o_t, s.size)
            log_evidence -= tl.where(m_written, 0.5 * (C * tl.log(b_s * TWO_PI) + total), 0.0)
    if p_log_evidence is not None:
        tl.store(p_log_evidence, tl.sum(log_evidence, 0))


@triton.jit
def apply_pattern_by_pattern(to, mean, patterns, s, gain, energy, c, SIZE: tl.constexpr):
    """Columns from ``c`` on of R through all patterns, in registers:  e = (z − Rᵀw)/√s,  R ← R + g eᵀ."""
    T = patterns.weights.rows
    o_k, o_c, o_e = tl.arange(0, SIZE), tl.arange(0, BLOCK) + c, tl.arange(0, CHUNK)
    b_mean = load_tile(mean, o_k, o_c)
    for first in range(0, T, CHUNK):
        chunk_energy = tl.zeros((CHUNK,), tl.float32)
        for t in range(first, tl.minimum(first + CHUNK, T)):
            o_t = t + tl.arange(0, 1)
            m_written = is_written(patterns.mask, o_t, T)
            w = tl.sum(load_patterns(patterns.weights, o_t, o_k, m_written), 0)
            z = tl.sum(load_patterns(patterns.z, o_t, o_c, m_written), 0)
            g = load_vector(row_of(gain, t), o_k)
            error = (z - tl.sum(b_mean * w[:, None], 0)) / tl.sqrt(load_entry(s, t))
            b_mean += g[:, None] * error[None, :]
            chunk_energy = tl.where(o_e == t - first, tl.sum(error * error, 0), chunk_energy)
        store_vector(energy, chunk_energy, first + o_e)
    store_tile(to, b_mean, o_k, o_c)


@triton.jit
def apply_kernel(
    mean, patterns, p_new_mean, p_s, p_kl, p_log_evidence, p_gain, p_energy, p_ticket, K, C, T, tiles,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of columns of R', chunk by chunk:  E = L⁻¹ (Z − W R),  R ← R + GᵀE.

    L is found from what the factor phase left: L_tt² = s_t, and W Gᵀ is L below its diagonal.

    Bytes moved: mean in and out, values in, once; weights and gains once a tile of columns, from the second-level
    cache. With more than one chunk the mean is read and written again for each, from there too. The program that
    finishes last for a memory reports its patterns, unless ``p_kl`` is None; the order of the others does not change a
    bit.
    """
    C, mean = assume_fours(C, ALIGNED), assume_aligned(mean, ALIGNED)
    i_tile = tl.program_id(0) % tiles
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    patterns = patterns_of(patterns, i_b, T, K, C, ALIGNED)
    mean, new_mean = matrix_of(mean, i_b, K, C), result_of(p_new_mean, i_b, K, C)
    s, gain, energy = results_of(p_s, i_b, T), result_of(p_gain, i_b, T, K), result_of(p_energy, i_b, tiles, T)
    o_c = i_tile * BLOCK + tl.arange(0, BLOCK)
    for k in range(0, K, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        store_tile(new_mean, load_tile(mean, o_k, o_c), o_k, o_c)
    for first in range(0, T, CHUNK):
        tl.debug_barrier()
        apply_chunk(new_mean, patterns, s, gain, row_of(energy, i_tile), first, o_c, PRECISION)
    if p_kl is not None:
        tl.debug_barrier()
        if tl.atomic_add(p_ticket + i_b, 1, sem="acq_rel") == tiles - 1:
            p_evidence = None if p_log_evidence is None else p_log_evidence + i_b
            report_patterns(results_of(p_kl, i_b, T), p_evidence, patterns, s, energy, C)


@triton.jit
def apply_chunk(mean, patterns, s, gain, energy, first, o_c, PRECISION: tl.constexpr):
    """Columns ``o_c`` of the mean through a chunk of patterns, in place."""
    T = s.size
    o = tl.arange(0, CHUNK)
    o_t = first + o
    m_written = is_written(patterns.mask, o_t, T)
    lower, predicted = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, o_c.shape[0]), tl.float32)
    for k in range(0, mean.rows, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        b_weights = load_patterns(patterns.weights, o_t, o_k, m_written)
        predicted = tl.dot(b_weights, load_tile(mean, o_k, o_c), predicted, input_precision=PRECISION)
        lower = tl.dot(b_weights, load_tile(transposed(gain), o_k, o_t), lower, input_precision="ieee")
    error = load_patterns(patterns.z, o_t, o_c, m_written) - predicted
    pivots = tl.sqrt(load_vector(s, o_t, 1.0))
    lower = tl.where(o[:, None] == o[None, :], pivots[:, None], tl.where(o[:, None] > o[None, :], lower, 0.0))
    inverse = invert_lower(lower, tl.minimum(CHUNK, T - first))
    error = tl.dot(inverse, error, input_precision="ieee")
    store_vector(energy, tl.sum(error * error, 1), o_t)
    for k in range(0, mean.rows, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        b_gain = load_tile(transposed(gain), o_k, o_t)
        b_mean = tl.dot(b_gain, error, load_tile(mean, o_k, o_c), input_precision=PRECISION)
        tl.debug_barrier()
        store_tile(mean, b_mean, o_k, o_c)


def launch_apply(
    mean: Tensor, patterns: Patterns, new_mean: Tensor, s: Tensor, kl: Tensor | None,
    log_evidence: Tensor | None, gain: Tensor, precision: int,
) -> None:  # fmt: skip
    """Fill ``new_mean`` and, where wanted, ``log_evidence``, and make ``kl`` of the wᵀUw that it holds.

    There is a program for each memory and tile of columns. ``kl`` is None where nothing is reported.
    """
    (B, K, C), T = mean.shape, gain.shape[1]
    tiles = max(1, blocks_of(C))
    energy, ticket = mean.new_empty(B, tiles, T), torch.zeros(B, dtype=torch.int32, device=mean.device)
    apply_kernel[(B * tiles,)](
        matrices(mean), patterns, new_mean, s, kl, log_evidence, gain, energy, ticket, K, C, T, tiles,
        PRECISION=precision_of(precision), ALIGNED=rows_aligned(mean, patterns.z.p), **warps(4),
    )  # fmt: skip
