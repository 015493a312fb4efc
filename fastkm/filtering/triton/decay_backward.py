"""What the decay of a filter's chunk receives in its backward: equations (F16) and (F17) of docs/math/filtering.md.

Every cotangent of ln a comes here, from the scaled rows, from D, and from the memory after the chunk; those of the
factors of decay are sums over the steps after them. Steps past the end of a chunk do not decay, so that what belongs to
its last step may be given to the last row.
"""

import triton
import triton.language as tl

from fastkm._linalg.triton.patterns import load_patterns
from fastkm._linalg.triton.product import dot, product, product_tile
from fastkm._linalg.triton.tiles import BLOCK, load_diagonal, load_tile, rows_from, store_tile, transposed
from fastkm._linalg.triton.vectors import store_vector
from fastkm.filtering.triton.chunk import energies_of, read_tile
from fastkm.filtering.triton.chunk_backward import add_scaled_rows
from fastkm.filtering.triton.steps import places_of, written_rows


@triton.jit
def scale_memory_cotangent(to_cov, growth):
    """The cotangent of U' becomes that of U − Gᵀ G. Ends with a barrier."""
    for i in range(0, to_cov.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, to_cov.columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            store_tile(to_cov, growth * load_tile(to_cov, o_i, o_j), o_i, o_j)
    tl.debug_barrier()


@triton.jit
def growth_cotangent(to, parts, memory):
    """2 ⟨Ū', U'⟩, what forgetting's scaling of the memory gives to ln a of the last step.

    Ū' has been scaled, and −2 G Ū' stands in the place of Ḡ.
    """
    return (2 * dot(to.cov, memory.cov) + dot(parts.to_gain, parts.chunk.gain)).to(tl.float32)


@triton.jit
def scaled_values_cotangents(parts, steps, whitened, reported, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """What forgetting's scaling of values, reads and energies gives to ln a."""
    o = tl.arange(0, CHUNK)
    chunk, scale = parts.chunk, whitened.decay.value_scale
    m_written = written_rows(steps, o)
    total = reported.log_evidence * energies_of(chunk.error, chunk.error.columns, CHUNK) / (scale * scale)
    for c in range(0, chunk.error.columns, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        z = load_patterns(steps.z, steps.first + o, o_c, m_written) * scale[:, None]
        total -= tl.sum(load_tile(parts.to_values, o, o_c) * z, 1)
        of_reads = load_tile(rows_from(parts.to_values, CHUNK, CHUNK), o, o_c)
        total -= tl.sum(of_reads * read_tile(chunk, o, o_c, PRECISION, CHUNK), 1)
    return total


@triton.jit
def end_cotangents(to, parts, memory, decay, prior_var):
    """What reaches ln a of the last step, and u, from the memory that retention relaxes. Before R̄' and Ū' change."""
    trace = tl.full((), 0, tl.float32)
    for k in range(0, to.cov.rows, BLOCK):
        trace += tl.sum(load_diagonal(to.cov, k + tl.arange(0, BLOCK), 0.0), 0)
    chunk = parts.chunk
    of_mean = dot(to.mean, memory.mean) + dot(parts.to_crossed, rows_from(chunk.projected, 0, chunk.gain.rows))
    of_cov = dot(to.cov, memory.cov) - (prior_var * trace).to(tl.float64)
    at_end = (decay.end * (of_mean + 2 * decay.end * of_cov)).to(tl.float32)
    return at_end, trace * decay.end_relaxed / prior_var


@triton.jit
def scale_inputs(parts, scale, CHUNK: tl.constexpr):
    """Cotangents of W~ and Q~ become those of diag(a) W and diag(a) Q. Returns those of ln a. Ends with a barrier."""
    o = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float32)
    for half in range(2):
        inputs, to = rows_from(parts.chunk.inputs, half * CHUNK, CHUNK), rows_from(parts.to_inputs, half * CHUNK, CHUNK)
        for k in range(0, inputs.columns, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            tile = load_tile(to, o, o_k)
            total += tl.sum(tile * load_tile(inputs, o, o_k), 1)
            store_tile(to, tile * scale[:, None], o, o_k)
    tl.debug_barrier()
    return total


@triton.jit
def row_dots(x, y, CHUNK: tl.constexpr):
    o = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float32)
    for k in range(0, x.columns, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        total += tl.sum(load_tile(x, o, o_k) * load_tile(y, o, o_k), 1)
    return total


@triton.jit
def drift_cotangents(parts, whitened, reported, prior_var, CHUNK: tl.constexpr):
    """(F16) and the terms in D of (F17); adds what W and Q receive. Returns what ln a and u do. Ends with a barrier."""
    o = tl.arange(0, CHUNK)
    chunk, scale = parts.chunk, whitened.decay.scale
    K = chunk.plain.columns
    weights, queries = rows_from(chunk.plain, 0, CHUNK), rows_from(chunk.plain, CHUNK, CHUNK)
    m_lower, m_last = o[:, None] >= o[None, :], o == CHUNK - 1
    drift = load_tile(chunk.drift, o, o)
    squares, reads = load_tile(parts.to_squares, o, o), load_tile(rows_from(parts.to_squares, CHUNK, CHUNK), o, o)
    store_tile(parts.drifted, 2 * squares * drift, o, o)
    store_tile(rows_from(parts.drifted, CHUNK, CHUNK), reads * drift, o, o)

    flat = tl.where(o[:, None] > o[None, :], 2 * squares, tl.where(m_lower, squares, 0.0))
    to_drift = flat * product_tile(weights, transposed(weights), o, o, 0, K)
    to_drift += reads * product_tile(queries, transposed(weights), o, o, 0, K)
    at_end = row_dots(parts.to_crossed, weights, CHUNK)
    to_drift += tl.where(m_last[:, None], at_end[None, :], 0.0)
    scaled = tl.where(m_lower, to_drift * drift, 0.0)
    of_columns = scaled + 2 * prior_var * to_drift * scale[:, None] * scale[None, :]
    of_norms = reported.variance * whitened.norms
    to_log_scale = tl.sum(scaled, 1) - tl.sum(of_columns, 0) - 2 * of_norms * scale * scale * prior_var
    to_prior_var = (tl.sum(tl.sum(scaled, 1), 0) + tl.sum(of_norms * whitened.decay.relaxed, 0)) / prior_var

    drift_at_end = tl.sum(tl.where(m_last[:, None], drift, 0.0), 0)
    tl.debug_barrier()
    to_weights, to_queries = rows_from(parts.to_inputs, 0, CHUNK), rows_from(parts.to_inputs, CHUNK, CHUNK)
    product(to_weights, transposed(parts.drifted), chunk.plain, accumulate=True)
    product(to_queries, rows_from(parts.drifted, CHUNK, CHUNK), weights, accumulate=True)
    add_scaled_rows(to_weights, drift_at_end, parts.to_crossed, CHUNK)
    add_scaled_rows(to_queries, 2 * reported.variance * whitened.decay.relaxed, queries, CHUNK)
    return to_log_scale, to_prior_var


@triton.jit
def store_decay_cotangents(to, to_log_scale, factor, exponent, steps, CHUNK: tl.constexpr):
    """Σ_{i ≥ s} of the cotangents of ln a, times what ln a has of each factor; 0 for steps that are masked."""
    o = tl.arange(0, CHUNK)
    later = tl.sum(tl.where(o[:, None] >= o[None, :], to_log_scale[:, None], 0.0), 0)
    store_vector(to, tl.where(written_rows(steps, o), exponent * later / factor, 0.0), places_of(steps, o))
