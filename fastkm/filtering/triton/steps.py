"""Steps of a sequence: how they are cut into chunks, how a chunk decays, and its rows in the workspace.

A segment is ``CHUNK`` steps from a multiple of ``CHUNK`` on. Without forgetting it is one chunk. With forgetting, what
a chunk subtracts from the covariance is up to Π 1/γ times what is left, and rounds at its own size; a segment is then
cut into several chunks. A chunk always has ``CHUNK`` rows: those past its end hold zeros and do not decay.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkm._linalg.triton.patterns import is_written, load_patterns
from fastkm._linalg.triton.tiles import (
    BLOCK,
    assume_aligned,
    assume_fours,
    load_diagonal,
    matrix_of,
    number_of,
    optional_vector_of,
    or_empty,
    pick,
    rows_from,
    store_tile,
    vector_of,
)
from fastkm._linalg.triton.vectors import load_vector

# Π 1/γ that a chunk may have, beyond its first step.
MOST_GROWTH = tl.constexpr(1.5)


class Steps(NamedTuple):
    """What a filter is given besides the memory, as a kernel argument; the laws of decay and the mask may be None."""

    weights: Any
    z: Any
    queries: Any
    noise: Any
    retention: Any
    forgetting: Any
    mask: Any
    prior_var: Any


@triton.jit
def steps_without_none(x):
    """() for a law of decay or a mask that is not given."""
    retention, forgetting, mask = or_empty(x.retention), or_empty(x.forgetting), or_empty(x.mask)
    return Steps(x.weights, x.z, x.queries, x.noise, retention, forgetting, mask, x.prior_var)


class ChunkSteps(NamedTuple):
    """Steps [first, end) of one memory. The tensors are those of the whole sequence, () for None, and u is a number."""

    weights: Any
    z: Any
    queries: Any
    noise: Any
    retention: Any
    forgetting: Any
    mask: Any
    prior_var: Any
    first: Any
    end: Any


@triton.jit
def steps_of(x, i_b, first, end, T, K, C, ALIGNED: tl.constexpr):
    """Steps [first, end) of memory ``i_b``. ALIGNED: every row is, as ``launch.rows_aligned`` found."""
    return ChunkSteps(
        matrix_of(assume_aligned(x.weights, ALIGNED), i_b, T, K),
        matrix_of(assume_aligned(x.z, ALIGNED), i_b, T, C),
        matrix_of(assume_aligned(x.queries, ALIGNED), i_b, T, K),
        vector_of(x.noise, i_b, T),
        optional_vector_of(x.retention, i_b, T),
        optional_vector_of(x.forgetting, i_b, T),
        optional_vector_of(x.mask, i_b, T),
        number_of(x.prior_var, i_b),
        first,
        end,
    )


@triton.jit
def places_of(steps, o):
    """Where rows ``o`` of a chunk lie in a vector of the sequence; past its last entry for rows that are none."""
    return tl.where(o < steps.end - steps.first, steps.first + o, steps.noise.size)


@triton.jit
def written_rows(steps, o):
    """Which rows ``o`` of a chunk are patterns that are written."""
    return is_written(steps.mask, steps.first + o, steps.end)


# -------------------------------------------------------------------------------------------------------------- chunks


@triton.jit
def load_factors(factors, steps, o):
    """Factors of decay; 1 for rows that are masked or past the end."""
    return tl.where(written_rows(steps, o), load_vector(factors, steps.first + o, 1.0), 1.0)


@triton.jit
def cut_segment(steps, segment, CHUNK: tl.constexpr):
    """The number of chunks of the segment that starts at row ``segment``, and the chunk that each step belongs to."""
    o = tl.arange(0, CHUNK)
    chunk, of_step = tl.full((), 0, tl.int32), tl.zeros((CHUNK,), tl.int32)
    if len(steps.forgetting) != 0:
        factors = load_factors(steps.forgetting, steps, segment + o)
        left = tl.full((), 1, tl.float32)
        of_step += CHUNK  # of none
        for t in range(tl.minimum(CHUNK, steps.end - segment)):  # a number that is not known is not unrolled
            factor = pick(factors, o, t)
            ends = (t > 0) & (left * factor * MOST_GROWTH < 1)
            left = tl.where(ends, factor, left * factor)
            chunk += ends.to(tl.int32)
            of_step = tl.where(o == t, chunk, of_step)
    return chunk + 1, of_step


@triton.jit
def bounds_of_chunk(of_step, chunk, segment, T):
    """The first step of a chunk, and the one after its last."""
    first = tl.sum((of_step < chunk).to(tl.int32), 0)
    end = tl.sum((of_step <= chunk).to(tl.int32), 0)
    return segment + first, tl.minimum(segment + end, T)


@triton.jit
def afresh(size, first, ALIGNED: tl.constexpr):
    """``size``, as a number that the compiler takes for another in every chunk: a step has a number below 2³⁰.

    Otherwise it computes the addresses of all matrices of a chunk before the loop over chunks, and spills them.
    """
    return assume_fours(size + (first >> 30), ALIGNED)


# --------------------------------------------------------------------------------------------------------------- decay


class Decay(NamedTuple):
    """The decay of a chunk, in registers."""

    factor: Any  # α or γ; 1 without decay [CHUNK]
    scale: Any  # a [CHUNK]
    value_scale: Any  # what values are multiplied by: a with forgetting, else 1 [CHUNK]
    relaxed: Any  # (1 − a²) u, the diagonal of D; 0 without retention [CHUNK]
    end: Any  # e
    end_relaxed: Any  # (1 − e²) u
    growth: Any  # a_t² with forgetting, else 1


@triton.jit
def kept_between(factor, o):
    """Π of the factors of steps j + 1 to i, at (i, j); 0 above the diagonal."""
    products = tl.cumprod(tl.where(o[:, None] > o[None, :], factor[:, None], 1.0), 0)
    return tl.where(o[:, None] >= o[None, :], products, 0.0)


@triton.jit
def load_decay(drift, steps, CHUNK: tl.constexpr):
    """(F4) and (F6). With retention it stores D, both triangles. The caller puts a barrier behind it.

    Nothing is divided, and no difference cancels: 1 − a_i² is the sum of Π_{s<p≤i} α_p² (1 − α_s²) over s ≤ i.
    """
    o = tl.arange(0, CHUNK)
    one, none = tl.full((CHUNK,), 1, tl.float32), tl.zeros((CHUNK,), tl.float32)
    number_one, number_none = tl.full((), 1, tl.float32), tl.full((), 0, tl.float32)
    if len(steps.retention) != 0:
        factor = load_factors(steps.retention, steps, o)
        kept = kept_between(factor, o)
        lost = (1 - factor) * (1 + factor) * steps.prior_var
        relaxed = tl.sum(kept * kept * lost[None, :], 1)
        of_columns = tl.sum(tl.where(o[:, None] == o[None, :], relaxed[:, None], 0.0), 0)
        tile = kept * of_columns[None, :]
        upper = tl.trans(tile)
        store_tile(drift, tl.where(o[:, None] >= o[None, :], tile, upper), o, o)
        scale = tl.cumprod(factor, 0)
        last = CHUNK - 1
        return Decay(factor, scale, one, relaxed, pick(scale, o, last), pick(relaxed, o, last), number_one)
    elif len(steps.forgetting) != 0:
        factor = load_factors(steps.forgetting, steps, o)
        left = tl.cumprod(factor, 0)
        scale = 1 / tl.sqrt(left)
        return Decay(factor, scale, scale, none, number_one, number_none, 1 / pick(left, o, CHUNK - 1))
    else:
        return Decay(one, one, one, none, number_one, number_none, number_one)


# ---------------------------------------------------------------------------------------------------------------- rows


@triton.jit
def load_rows(parts, steps, decay, cov, CHUNK: tl.constexpr):
    """Bring in W~ above Q~ and, with retention, W above Q. Ends with a barrier.

    Returns Σ_k w_k² of the covariance's diagonal as the chunk relaxes it, and ‖q‖².
    """
    o = tl.arange(0, CHUNK)
    o_t = steps.first + o
    m_written, m_t = written_rows(steps, o), o_t < steps.end
    variances, norms = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    for k in range(0, cov.columns, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        w, q = load_patterns(steps.weights, o_t, o_k, m_written), load_patterns(steps.queries, o_t, o_k, m_t)
        scaled = w * decay.scale[:, None]
        store_tile(parts.inputs, scaled, o, o_k)
        store_tile(rows_from(parts.inputs, CHUNK, CHUNK), q * decay.scale[:, None], o, o_k)
        diagonal = load_diagonal(cov, o_k, 0.0)
        variances += tl.sum(scaled * scaled * diagonal[None, :], 1)
        norms += tl.sum(q * q, 1)
        if len(steps.retention) != 0:
            store_tile(parts.plain, w, o, o_k)
            store_tile(rows_from(parts.plain, CHUNK, CHUNK), q, o, o_k)
            variances += decay.relaxed * tl.sum(w * w, 1)
    tl.debug_barrier()
    return variances, norms
