"""One chunk of a filter: a few steps are written and read at once. Equations (F4) to (F9) of docs/math/filtering.md.

Weights lie above queries in matrices of 2 · CHUNK rows, so that one product with the memory serves both.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkm._linalg.triton.condition import TWO_PI
from fastkm._linalg.triton.factor import (
    EPS,
    IS_INDEFINITE,
    IS_LOST,
    eliminate,
    holds_variance,
    inverse_of_factor,
)
from fastkm._linalg.triton.patterns import load_patterns
from fastkm._linalg.triton.product import IEEE, product, product_tile
from fastkm._linalg.triton.tiles import (
    BLOCK,
    diagonal,
    end_of,
    load_diagonal,
    load_tile,
    place,
    place_after,
    rows_from,
    store_tile,
    transposed,
)
from fastkm._linalg.triton.vectors import load_vector
from fastkm._runtime.status import OUT_OF_RANGE
from fastkm.filtering.triton.steps import load_decay, load_rows, written_rows

IS_OUT_OF_RANGE = tl.constexpr(OUT_OF_RANGE)


class Memory(NamedTuple):
    """A memory that is filtered in place."""

    mean: Any  # R [K, C]
    cov: Any  # U [K, K]


class ChunkParts(NamedTuple):
    """The workspace of a chunk of t = CHUNK steps."""

    inputs: Any  # W~ above Q~ [2t, K]
    plain: Any  # W above Q, with retention [2t, K]
    projected: Any  # V above X [2t, K]
    crossed: Any  # e V + diag(D_t·) W, with retention [t, K]
    gain: Any  # G [t, K]
    residual: Any  # Z~ − W~ R above Q~ R [2t, C]
    error: Any  # E [t, C]
    squares: Any  # S − diag(σ²) above H [2t, t]
    drift: Any  # D, with retention [t, t]
    inverse: Any  # L⁻¹ [t, t]
    read_gain: Any  # P [t, t]
    end: Any


class Whitened(NamedTuple):
    """What is known of each step of a chunk, in registers."""

    decay: Any
    norms: Any  # ‖q‖² [t]
    pivots: Any  # s = L_tt² [t]
    explained: Any  # s − σ² [t]
    status: Any


@triton.jit
def chunk_layout(p, K, C, CHUNK: tl.constexpr):
    inputs = place(p, 2 * CHUNK, K, K)
    plain = place_after(inputs, 2 * CHUNK, K, K)
    projected = place_after(plain, 2 * CHUNK, K, K)
    crossed = place_after(projected, CHUNK, K, K)
    gain = place_after(crossed, CHUNK, K, K)
    residual = place_after(gain, 2 * CHUNK, C, C)
    error = place_after(residual, CHUNK, C, C)
    squares = place_after(error, 2 * CHUNK, CHUNK, CHUNK)
    drift = place_after(squares, CHUNK, CHUNK, CHUNK)
    inverse = place_after(drift, CHUNK, CHUNK, CHUNK)
    read_gain = place_after(inverse, CHUNK, CHUNK, CHUNK)
    end = end_of(read_gain)
    return ChunkParts(inputs, plain, projected, crossed, gain, residual, error, squares, drift, inverse, read_gain, end)


# ----------------------------------------------------------------------------------------------------------- whitening


@triton.jit
def whiten_chunk(parts, memory, steps, READS: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """V, S, L⁻¹, G and E of a chunk, and with READS X, H and Q~ R too. Ends with a barrier."""
    ROWS: tl.constexpr = 2 * CHUNK if READS else CHUNK
    decay = load_decay(parts.drift, steps, CHUNK)
    variances, norms = load_rows(parts, steps, decay, memory.cov, CHUNK)
    product(rows_from(parts.projected, 0, ROWS), parts.inputs, memory.cov, ROWS=ROWS)
    find_squares(parts, steps, ROWS, CHUNK)
    pivots, explained, status = factor_chunk(parts, steps, variances, CHUNK)
    if len(steps.retention) != 0:
        cross_rows(parts, decay, CHUNK)
        product(parts.gain, parts.inverse, parts.crossed)
    else:
        product(parts.gain, parts.inverse, rows_from(parts.projected, 0, CHUNK))
    find_residuals(parts, memory.mean, steps, decay, ROWS, PRECISION, CHUNK)
    product(parts.error, parts.inverse, rows_from(parts.residual, 0, CHUNK))
    return Whitened(decay, norms, pivots, explained, status)


@triton.jit
def find_squares(parts, steps, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """(F5): S − diag(σ²) above H. Ends with a barrier."""
    o, o_rows = tl.arange(0, CHUNK), tl.arange(0, ROWS)
    K = parts.inputs.columns
    tile = product_tile(parts.projected, transposed(rows_from(parts.inputs, 0, CHUNK)), o_rows, o, 0, K)
    if len(steps.retention) != 0:
        among = product_tile(parts.plain, transposed(rows_from(parts.plain, 0, CHUNK)), o_rows, o, 0, K)
        tile += load_tile(parts.drift, o_rows % CHUNK, o) * among
    store_tile(parts.squares, tile, o_rows, o)
    tl.debug_barrier()


@triton.jit
def factor_chunk(parts, steps, variances, CHUNK: tl.constexpr):
    """L⁻¹; returns the pivots, what the memory explains of them, and the status. Ends with a barrier."""
    o = tl.arange(0, CHUNK)
    K, count = parts.inputs.columns, steps.end - steps.first
    noise = tl.where(o < count, load_vector(steps.noise, steps.first + o, 1.0), 1.0)
    tile = load_tile(parts.squares, o, o)
    own = diagonal(tile, o)
    slack = tl.abs(own + noise) * (4.0 * EPS) * (K + CHUNK)
    tile, good, explained = eliminate(tile, count, noise, slack, True)
    pivots = diagonal(tile, o)
    held = (o >= count) | holds_variance(variances, explained, noise, pivots)
    status = tl.where(good, tl.where(tl.min(held.to(tl.int32), 0) == 0, IS_LOST, 0), IS_INDEFINITE)
    if len(steps.forgetting) != 0:
        in_range = tl.min((tl.abs(own) < float("inf")).to(tl.int32), 0)
        status = tl.where(in_range == 0, IS_OUT_OF_RANGE, status)
    store_tile(parts.inverse, inverse_of_factor(tile, pivots, o), o, o)
    tl.debug_barrier()
    return pivots, explained, status


@triton.jit
def cross_rows(parts, decay, CHUNK: tl.constexpr):
    """e V + diag(D_t·) W of (F9). Ends with a barrier."""
    o = tl.arange(0, CHUNK)
    drift_at_end = tl.sum(load_tile(parts.drift, CHUNK - 1 + tl.arange(0, 1), o), 0)
    for k in range(0, parts.crossed.columns, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        tile = decay.end * load_tile(parts.projected, o, o_k) + drift_at_end[:, None] * load_tile(parts.plain, o, o_k)
        store_tile(parts.crossed, tile, o, o_k)
    tl.debug_barrier()


@triton.jit
def find_residuals(parts, mean, steps, decay, ROWS: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """Z~ − W~ R above Q~ R. Ends with a barrier."""
    o, o_rows = tl.arange(0, CHUNK), tl.arange(0, ROWS)
    m_written = written_rows(steps, o_rows) & (o_rows < CHUNK)
    scale = tl.sum(tl.where(o_rows[:, None] == o[None, :], decay.value_scale[None, :], 0.0), 1)
    for c in range(0, mean.columns, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        tile = product_tile(parts.inputs, mean, o_rows, o_c, 0, mean.rows, PRECISION)
        z = load_patterns(steps.z, steps.first + o_rows, o_c, m_written) * scale[:, None]
        store_tile(parts.residual, tl.where((o_rows < CHUNK)[:, None], z - tile, tile), o_rows, o_c)
    tl.debug_barrier()


# --------------------------------------------------------------------------------------------------------------- reads


@triton.jit
def find_read_gain(parts, READ_BEFORE: tl.constexpr, CHUNK: tl.constexpr):
    """P of (F7); returns the sums of the squares of its rows. Ends with a barrier."""
    o = tl.arange(0, CHUNK)
    tile = product_tile(rows_from(parts.squares, CHUNK, CHUNK), transposed(parts.inverse), o, o, 0, CHUNK)
    if READ_BEFORE:
        tile = tl.where(o[:, None] > o[None, :], tile, 0.0)
    else:
        tile = tl.where(o[:, None] >= o[None, :], tile, 0.0)
    store_tile(parts.read_gain, tile, o, o)
    tl.debug_barrier()
    return tl.sum(tile * tile, 1)


@triton.jit
def find_read_variance(parts, whitened, READ_BEFORE: tl.constexpr, CHUNK: tl.constexpr):
    """v of (F8), which rounding may leave below zero. Makes P, and ends with a barrier."""
    o = tl.arange(0, CHUNK)
    reads, queries = rows_from(parts.projected, CHUNK, CHUNK), rows_from(parts.inputs, CHUNK, CHUNK)
    variance = whitened.decay.relaxed * whitened.norms
    for k in range(0, queries.columns, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        variance += tl.sum(load_tile(reads, o, o_k) * load_tile(queries, o, o_k), 1)
    return variance - find_read_gain(parts, READ_BEFORE, CHUNK)


@triton.jit
def read_tile(parts, o, o_c, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """Columns ``o_c`` of O~ = Q~ R + P E."""
    product = product_tile(parts.read_gain, parts.error, o, o_c, 0, CHUNK, PRECISION)
    return load_tile(rows_from(parts.residual, CHUNK, CHUNK), o, o_c) + product


@triton.jit
def energies_of(error, C, CHUNK: tl.constexpr):
    """‖E_i‖²."""
    o = tl.arange(0, CHUNK)
    energy = tl.zeros((CHUNK,), tl.float32)
    for c in range(0, C, BLOCK):
        tile = load_tile(error, o, c + tl.arange(0, BLOCK))
        energy += tl.sum(tile * tile, 1)
    return energy


@triton.jit
def log_evidence_of(parts, whitened, m_written, C, CHUNK: tl.constexpr):
    """ln p of the patterns that are written, their sum in float64."""
    scale = whitened.decay.value_scale
    energy = energies_of(parts.error, C, CHUNK) / (scale * scale)
    each = tl.where(m_written, -0.5 * (C * tl.log(whitened.pivots * TWO_PI) + energy), 0.0)
    return tl.sum(each.to(tl.float64), 0)


# -------------------------------------------------------------------------------------------------------------- memory


@triton.jit
def advance_memory(memory, parts, decay, status, FORGETS: tl.constexpr, PRECISION: tl.constexpr):
    """(F9): the memory after the chunk; returns the status. Ends with a barrier."""
    update_symmetric(memory.cov, decay, transposed(parts.gain), parts.gain)
    update_scaled(memory.mean, decay.end, transposed(parts.gain), parts.error, PRECISION)
    if FORGETS:
        largest = tl.full((), 0, tl.float32)
        for k in range(0, memory.cov.rows, BLOCK):
            diagonal = load_diagonal(memory.cov, k + tl.arange(0, BLOCK), 0.0)
            bad = tl.max(tl.where(tl.abs(diagonal) < float("inf"), 0.0, 1.0), 0)
            largest = tl.maximum(largest, bad)
        status = tl.where(largest > 0, IS_OUT_OF_RANGE, status)
    return status


@triton.jit
def update_symmetric(cov, decay, a, b):
    """U ← growth (e² U + (1 − e²) u I − A B) for a symmetric product, both triangles alike. Ends with a barrier."""
    for i in range(0, cov.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, i + BLOCK, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            tile = decay.end * decay.end * load_tile(cov, o_i, o_j) - product_tile(a, b, o_i, o_j, 0, a.columns)
            tile = (tile + tl.where(o_i[:, None] == o_j[None, :], decay.end_relaxed, 0.0)) * decay.growth
            tl.debug_barrier()
            store_tile(cov, tile, o_i, o_j)
            store_tile(transposed(cov), tile, o_i, o_j)
    tl.debug_barrier()


@triton.jit
def update_scaled(out, factor, a, b, precision: tl.constexpr = IEEE):
    """out = factor out + A B. Ends with a barrier."""
    for i in range(0, out.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, out.columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            tile = factor * load_tile(out, o_i, o_j) + product_tile(a, b, o_i, o_j, 0, a.columns, precision)
            store_tile(out, tile, o_i, o_j)
    tl.debug_barrier()
