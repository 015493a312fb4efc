"""Backward of one chunk of a filter: equations (F10) to (F15) of docs/math/filtering.md, with bars for cotangents.

(1)  Ḡ = E R̄'ᵀ − 2 G Ū',  P̄ = tril(Ō Eᵀ) − 2 diag(v̄) P,  Ē = G R̄' + Pᵀ Ō − ℓ̄ E
(2)  B̄ = L⁻ᵀ Ḡ,  Z̄ = L⁻ᵀ Ē,  H̄ = P̄ L⁻¹
(3)  N = Ḡ Gᵀ + Ē Eᵀ + P̄ᵀ P, its lower triangle mirrored,  S̄ = L⁻ᵀ (diag(L_tt² p̄_t) − ½ N) L⁻¹
(4)  [V̄; X̄] = [S̄; H̄] W~ + [e B̄; diag(v̄) Q~]
(5)  [W~; Q~]‾ = [V̄; X̄] U + [−Z̄; Ō] Rᵀ + [S̄ V + H̄ᵀ X; diag(v̄) X]
(6)  Ū = e² Ū' + sym([W~; Q~]ᵀ [V̄; X̄]),  R̄ = e R̄' + [W~; Q~]ᵀ [−Z̄; Ō]
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkm._linalg.triton.product import product, product_tile
from fastkm._linalg.triton.tiles import (
    BLOCK,
    end_of,
    load_diagonal,
    load_tile,
    place,
    place_after,
    rows_from,
    store_tile,
    transposed,
)
from fastkm._linalg.triton.vectors import load_cotangent
from fastkm.filtering.triton.chunk import chunk_layout, update_scaled
from fastkm.filtering.triton.steps import places_of, written_rows


class Cotangents(NamedTuple):
    """Cotangents of what a filter returns; None stands for zero, and () after ``cotangents_of``."""

    mean: Any
    cov: Any
    read_values: Any
    variance: Any
    s: Any
    log_evidence: Any


class BackwardParts(NamedTuple):
    """The workspace of the backward of a chunk of t = CHUNK steps, and the memories that the filter passed through."""

    chunk: Any
    to_projected: Any  # V̄ above X̄ [2t, K]
    to_values: Any  # −Z̄ above Ō [2t, C]
    to_inputs: Any  # cotangents of W~ above those of Q~ [2t, K]
    to_gain: Any  # Ḡ [t, K]
    to_crossed: Any  # B̄ [t, K]
    to_error: Any  # Ē [t, C]
    to_squares: Any  # S̄ above H̄ [2t, t]
    drifted: Any  # 2 S̄∘D above H̄∘D, with retention [2t, t]
    to_read_gain: Any  # P̄ [t, t]
    inner: Any  # diag(L_tt² p̄_t) − ½ N [t, t]
    solved: Any  # the former times L⁻¹ [t, t]
    saved: Any  # U beside R of each memory that is kept [MEMORIES · K, K + C]
    end: Any


class Reported(NamedTuple):
    """Cotangents of what a chunk reports of each step, in registers [t]."""

    variance: Any  # v̄; 0 where v was below zero by rounding
    innovation: Any  # p̄
    log_evidence: Any  # ℓ̄ where a pattern is written


@triton.jit
def filter_backward_layout(p, K, C, memories, CHUNK: tl.constexpr):
    chunk = chunk_layout(p, K, C, CHUNK)
    to_projected = place(chunk.end, 2 * CHUNK, K, K)
    to_values = place_after(to_projected, 2 * CHUNK, C, C)
    to_inputs = place_after(to_values, 2 * CHUNK, K, K)
    to_gain = place_after(to_inputs, CHUNK, K, K)
    to_crossed = place_after(to_gain, CHUNK, K, K)
    to_error = place_after(to_crossed, CHUNK, C, C)
    to_squares = place_after(to_error, 2 * CHUNK, CHUNK, CHUNK)
    drifted = place_after(to_squares, 2 * CHUNK, CHUNK, CHUNK)
    to_read_gain = place_after(drifted, CHUNK, CHUNK, CHUNK)
    inner = place_after(to_read_gain, CHUNK, CHUNK, CHUNK)
    solved = place_after(inner, CHUNK, CHUNK, CHUNK)
    saved = place_after(solved, memories * K, K + C, K + C)
    return BackwardParts(
        chunk, to_projected, to_values, to_inputs, to_gain, to_crossed, to_error, to_squares, drifted, to_read_gain,
        inner, solved, saved, end_of(saved),
    )  # fmt: skip


@triton.jit
def add_scaled_rows(to, factors, x, CHUNK: tl.constexpr):
    """to += diag(factors) X for CHUNK rows. Ends with a barrier."""
    o = tl.arange(0, CHUNK)
    for k in range(0, to.columns, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        store_tile(to, load_tile(to, o, o_k) + factors[:, None] * load_tile(x, o, o_k), o, o_k)
    tl.debug_barrier()


@triton.jit
def add_symmetric_product(to, factor, a, b):
    """to = factor to + sym(A B), both triangles the same. Ends with a barrier."""
    for i in range(0, to.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, i + BLOCK, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            tile = product_tile(a, b, o_i, o_j, 0, a.columns)
            tile += product_tile(transposed(b), transposed(a), o_i, o_j, 0, a.columns)
            tile = factor * load_tile(to, o_i, o_j) + 0.5 * tile
            tl.debug_barrier()
            store_tile(to, tile, o_i, o_j)
            store_tile(transposed(to), tile, o_i, o_j)
    tl.debug_barrier()


@triton.jit
def load_reported(parts, grads, whitened, variance, steps, CHUNK: tl.constexpr):
    """The cotangents that the caller gives of a chunk: stores Ō, and ends with a barrier."""
    o = tl.arange(0, CHUNK)
    C = parts.to_values.columns
    o_t = places_of(steps, o)
    reads = rows_from(parts.to_values, CHUNK, CHUNK)
    for c in range(0, C, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        if len(grads.read_values) != 0:
            tile = load_tile(grads.read_values, o_t, o_c) / whitened.decay.value_scale[:, None]
        else:
            tile = tl.zeros((CHUNK, BLOCK), tl.float32)
        store_tile(reads, tile, o, o_c)
    tl.debug_barrier()
    to_variance = tl.where(variance > 0, load_cotangent(grads.variance, o_t), 0.0)
    evidence = tl.where(written_rows(steps, o), grads.log_evidence, 0.0)
    to_s = load_cotangent(grads.s, o_t) - 0.5 * evidence * C / whitened.pivots
    return Reported(to_variance, to_s, evidence)


@triton.jit
def back_through_memory(to, parts, reported, decay, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """(1) but for P̄, where −2 G Ū' stands in the place of Ḡ. Ends with a barrier."""
    product(parts.to_gain, parts.chunk.error, transposed(to.mean), accumulate=True, precision=PRECISION)
    product(parts.to_error, parts.chunk.gain, to.mean, precision=PRECISION)
    reads = rows_from(parts.to_values, CHUNK, CHUNK)
    product(parts.to_error, transposed(parts.chunk.read_gain), reads, accumulate=True, precision=PRECISION)
    factors = -reported.log_evidence / (decay.value_scale * decay.value_scale)
    add_scaled_rows(parts.to_error, factors, parts.chunk.error, CHUNK)


@triton.jit
def back_through_reads(parts, reported, READ_BEFORE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """P̄ and H̄. Ends with a barrier."""
    o = tl.arange(0, CHUNK)
    reads = rows_from(parts.to_values, CHUNK, CHUNK)
    tile = product_tile(reads, transposed(parts.chunk.error), o, o, 0, reads.columns, PRECISION)
    tile -= 2 * reported.variance[:, None] * load_tile(parts.chunk.read_gain, o, o)
    if READ_BEFORE:
        tile = tl.where(o[:, None] > o[None, :], tile, 0.0)
    else:
        tile = tl.where(o[:, None] >= o[None, :], tile, 0.0)
    store_tile(parts.to_read_gain, tile, o, o)
    tl.debug_barrier()
    product(rows_from(parts.to_squares, CHUNK, CHUNK), parts.to_read_gain, parts.chunk.inverse)


@triton.jit
def back_through_factor(parts, whitened, reported, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """B̄, −Z̄ and S̄ of (2) and (3). Ends with a barrier."""
    o = tl.arange(0, CHUNK)
    chunk = parts.chunk
    product(parts.to_crossed, transposed(chunk.inverse), parts.to_gain)
    product(rows_from(parts.to_values, 0, CHUNK), transposed(chunk.inverse), parts.to_error, scale=-1.0)
    tile = product_tile(parts.to_gain, transposed(chunk.gain), o, o, 0, chunk.gain.columns)
    tile += product_tile(parts.to_error, transposed(chunk.error), o, o, 0, chunk.error.columns, PRECISION)
    tile += product_tile(transposed(parts.to_read_gain), chunk.read_gain, o, o, 0, CHUNK)
    mirrored = tl.trans(tile)
    tile = tl.where(o[:, None] >= o[None, :], tile, mirrored)
    of_pivots = tl.where(whitened.explained > 0, whitened.pivots * reported.innovation, 0.0)
    tile = tl.where(o[:, None] == o[None, :], of_pivots[:, None], 0.0) - 0.5 * tile
    store_tile(parts.inner, tile, o, o)
    tl.debug_barrier()
    product(parts.solved, parts.inner, chunk.inverse)
    product(rows_from(parts.to_squares, 0, CHUNK), transposed(chunk.inverse), parts.solved)


@triton.jit
def to_noise_of(parts, whitened, reported, CHUNK: tl.constexpr):
    """S̄_tt, and p̄_t where the memory explains nothing, so that s is the noise alone."""
    diagonal = load_diagonal(rows_from(parts.to_squares, 0, CHUNK), tl.arange(0, CHUNK), 0.0)
    return diagonal + tl.where(whitened.explained > 0, 0.0, reported.innovation)


@triton.jit
def back_through_projections(parts, memory, decay, reported, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """(4) and (5). Ends with a barrier."""
    ROWS: tl.constexpr = 2 * CHUNK
    chunk, to_reads = parts.chunk, rows_from(parts.to_projected, CHUNK, CHUNK)
    end = tl.zeros((CHUNK,), tl.float32) + decay.end
    product(parts.to_projected, parts.to_squares, rows_from(chunk.inputs, 0, CHUNK), ROWS=ROWS)
    add_scaled_rows(parts.to_projected, end, parts.to_crossed, CHUNK)
    add_scaled_rows(to_reads, reported.variance, rows_from(chunk.inputs, CHUNK, CHUNK), CHUNK)
    product(parts.to_inputs, parts.to_projected, memory.cov, ROWS=ROWS)
    product(parts.to_inputs, parts.to_values, transposed(memory.mean), accumulate=True, precision=PRECISION, ROWS=ROWS)
    to_weights, to_queries = rows_from(parts.to_inputs, 0, CHUNK), rows_from(parts.to_inputs, CHUNK, CHUNK)
    product(to_weights, transposed(parts.to_squares), chunk.projected, accumulate=True)
    add_scaled_rows(to_queries, reported.variance, rows_from(chunk.projected, CHUNK, CHUNK), CHUNK)


@triton.jit
def back_to_memory(to, parts, decay, PRECISION: tl.constexpr):
    """(6). Ends with a barrier."""
    turned = transposed(parts.chunk.inputs)
    add_symmetric_product(to.cov, decay.end * decay.end, turned, parts.to_projected)
    update_scaled(to.mean, decay.end, turned, parts.to_values, PRECISION)
