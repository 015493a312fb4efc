"""Backward kernel of filter_posterior: one launch, one program a memory, from the last chunk to the first.

The memory at the start of each segment is kept; what is between is computed again. With forgetting the chunks of one
segment are kept too, while their backward runs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkm._linalg.triton.factor import load_symmetric
from fastkm._linalg.triton.launch import implements, matrices, numbers, precision_of, rows_aligned, vectors, workspace
from fastkm._linalg.triton.product import product
from fastkm._linalg.triton.tiles import (
    BLOCK,
    Matrix,
    assume_aligned,
    copy,
    copy_or_zero,
    fill_zero,
    load_tile,
    matrix_of,
    number_of,
    optional_matrix_of,
    optional_vector_of,
    or_empty,
    result_of,
    results_of,
    rows_from,
    store_tile,
    transposed,
)
from fastkm._linalg.triton.vectors import store_vector
from fastkm.filtering.triton.chunk import Memory, advance_memory, find_read_variance, whiten_chunk
from fastkm.filtering.triton.chunk_backward import (
    Cotangents,
    back_through_factor,
    back_through_memory,
    back_through_projections,
    back_through_reads,
    back_to_memory,
    filter_backward_layout,
    load_reported,
    to_noise_of,
)
from fastkm.filtering.triton.decay_backward import (
    drift_cotangents,
    end_cotangents,
    growth_cotangent,
    scale_inputs,
    scale_memory_cotangent,
    scaled_values_cotangents,
    store_decay_cotangents,
)
from fastkm.filtering.triton.forward import chunk_of, options_of_a_head, steps_as_arguments
from fastkm.filtering.triton.steps import (
    afresh,
    bounds_of_chunk,
    cut_segment,
    places_of,
    steps_of,
    steps_without_none,
    written_rows,
)


class Gradients(NamedTuple):
    """Cotangents of what a filter is given. Those of the memory are passed from chunk to chunk where they are returned.

    Those of the laws of decay are None if the law was not given.
    """

    mean: Any
    cov: Any
    weights: Any
    z: Any
    queries: Any
    noise: Any
    retention: Any
    prior_var: Any
    forgetting: Any


class Given(NamedTuple):
    """The arguments of the kernel."""

    mean: Any
    cov: Any
    steps: Any
    grads: Any
    to: Any
    workspaces: Any
    K: Any
    C: Any
    T: Any
    memories: Any


@triton.jit
def cotangents_without_none(x):
    return Cotangents(
        or_empty(x.mean),
        or_empty(x.cov),
        or_empty(x.read_values),
        or_empty(x.variance),
        or_empty(x.s),
        or_empty(x.log_evidence),
    )


@triton.jit
def gradients_without_none(x):
    retention, forgetting = or_empty(x.retention), or_empty(x.forgetting)
    return Gradients(x.mean, x.cov, x.weights, x.z, x.queries, x.noise, retention, x.prior_var, forgetting)


@triton.jit
def cotangents_of(x, i_b, K, C, T):
    """The cotangents of memory ``i_b``."""
    evidence = 0.0
    if len(x.log_evidence) != 0:
        evidence = number_of(x.log_evidence, i_b)
    return Cotangents(
        optional_matrix_of(x.mean, i_b, K, C),
        optional_matrix_of(x.cov, i_b, K, K),
        optional_matrix_of(x.read_values, i_b, T, C),
        optional_vector_of(x.variance, i_b, T),
        optional_vector_of(x.s, i_b, T),
        evidence,
    )


@triton.jit
def gradients_of(x, i_b, K, C, T):
    """Where the gradients of memory ``i_b`` go, but for the number; () for a law of decay that was not given."""
    retention, forgetting = (), ()
    if len(x.retention) != 0:
        retention = results_of(x.retention.p, i_b, T)
    if len(x.forgetting) != 0:
        forgetting = results_of(x.forgetting.p, i_b, T)
    return Gradients(
        result_of(x.mean, i_b, K, C),
        result_of(x.cov, i_b, K, K),
        result_of(x.weights, i_b, T, K),
        result_of(x.z, i_b, T, C),
        result_of(x.queries, i_b, T, K),
        results_of(x.noise, i_b, T),
        retention,
        (),
        forgetting,
    )


@triton.jit
def memory_in(saved, i, K):
    """Memory ``i`` of those that are kept: U beside R."""
    x = rows_from(saved, i * K, K)
    return Memory(Matrix(x.p + K, K, saved.columns - K, x.s_row, 1), Matrix(x.p, K, K, x.s_row, 1))


@triton.jit
def filter_backward_kernel(
    mean, cov, steps, grads, to, workspaces, K, C, T, memories,
    READ_BEFORE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of a sequence of steps through one memory.

    Bytes moved: at least the arguments and cotangents in and the gradients out, each once, and K (K + C) numbers a
    segment out and in. Weights, queries and values are read a second time, for the memories between.
    """
    i_b, steps = tl.program_id(0).to(tl.int64), steps_without_none(steps)
    grads, to = cotangents_without_none(grads), gradients_without_none(to)
    given = Given(mean, cov, steps, grads, to, workspaces, K, C, T, memories)
    segments = tl.cdiv(T, CHUNK)
    start_backward(given, i_b, ALIGNED, CHUNK)
    sequence = steps_of(steps, i_b, 0, T, T, K, C, ALIGNED)
    for n in range(1, segments):
        segment = (n - 1) * CHUNK
        chunks, of_step = cut_segment(sequence, segment, CHUNK)
        for i in range(chunks):
            bounds = bounds_of_chunk(of_step, i, segment, T)
            advance_copy(given, i_b, tl.where(i == 0, n - 1, n), n, bounds, PRECISION, ALIGNED, CHUNK)

    to_prior_var = tl.full((), 0, tl.float64)
    for m in range(segments):
        n = segments - 1 - m
        segment = n * CHUNK
        chunks, of_step = cut_segment(sequence, segment, CHUNK)
        if len(sequence.forgetting) != 0:
            for i in range(1, chunks):
                bounds = bounds_of_chunk(of_step, i - 1, segment, T)
                source = tl.where(i == 1, n, segments + i - 1)
                advance_copy(given, i_b, source, segments + i, bounds, PRECISION, ALIGNED, CHUNK)
        for j in range(chunks):
            i = chunks - 1 - j
            first, end = bounds_of_chunk(of_step, i, segment, T)
            memory = tl.where(i == 0, n, segments + i)
            whitened, variance = repeat_chunk(
                given, i_b, memory, first, end, READ_BEFORE, PRECISION, ALIGNED, CHUNK
            )  # fmt: skip
            # Another number than before, so that no address is kept from the one half for the other.
            K_now, C_now = afresh(K, end, ALIGNED), afresh(C, end, ALIGNED)
            parts = parts_of(given, i_b, K_now, C_now, CHUNK)
            steps_now = steps_of(steps, i_b, first, end, T, K_now, C_now, ALIGNED)
            reported = load_reported(
                parts, cotangents_of(grads, i_b, K_now, C_now, T), whitened, variance, steps_now, CHUNK
            )  # fmt: skip
            of_chunk = chunk_backward(
                gradients_of(to, i_b, K_now, C_now, T), parts, memory_in(parts.saved, memory, K_now), steps_now,
                whitened, reported, READ_BEFORE, PRECISION, CHUNK,
            )  # fmt: skip
            if len(sequence.retention) != 0:
                to_prior_var += of_chunk.to(tl.float64)
    tl.store(to.prior_var + i_b, to_prior_var.to(tl.float32))


@triton.jit
def parts_of(given, i_b, K, C, CHUNK: tl.constexpr):
    """The workspace of memory ``i_b``."""
    p = given.workspaces.p + i_b * given.workspaces.s_b
    return filter_backward_layout(p, K, C, given.memories, CHUNK)


@triton.jit
def start_backward(given, i_b, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """Keep the memory before the first step, and take the cotangents of the one after the last."""
    K, C = given.K, given.C
    start = memory_in(parts_of(given, i_b, K, C, CHUNK).saved, 0, K)
    load_symmetric(start.cov, matrix_of(assume_aligned(given.cov, ALIGNED), i_b, K, K))
    copy(start.mean, matrix_of(assume_aligned(given.mean, ALIGNED), i_b, K, C))
    copy_or_zero(result_of(given.to.mean, i_b, K, C), optional_matrix_of(given.grads.mean, i_b, K, C))
    symmetric_or_zero(result_of(given.to.cov, i_b, K, K), optional_matrix_of(given.grads.cov, i_b, K, K))


@triton.jit
def symmetric_or_zero(to, x):
    """(X + Xᵀ) / 2; () stands for zero. Ends with a barrier."""
    if len(x) == 0:
        fill_zero(to)
    else:
        for i in range(0, to.rows, BLOCK):
            o_i = i + tl.arange(0, BLOCK)
            for j in range(0, to.columns, BLOCK):
                o_j = j + tl.arange(0, BLOCK)
                store_tile(to, 0.5 * (load_tile(x, o_i, o_j) + load_tile(transposed(x), o_i, o_j)), o_i, o_j)
        tl.debug_barrier()


@triton.jit
def advance_copy(
    given, i_b, source, to, bounds, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Memory ``to`` becomes memory ``source`` after the chunk with these bounds. Ends with a barrier."""
    K, C = afresh(given.K, bounds[0], ALIGNED), afresh(given.C, bounds[0], ALIGNED)
    parts = parts_of(given, i_b, K, C, CHUNK)
    steps = steps_of(given.steps, i_b, bounds[0], bounds[1], given.T, K, C, ALIGNED)
    copy(rows_from(parts.saved, to * K, K), rows_from(parts.saved, source * K, K))
    memory = memory_in(parts.saved, to, K)
    whitened = whiten_chunk(parts.chunk, memory, steps, False, PRECISION, CHUNK)
    advance_memory(memory, parts.chunk, whitened.decay, whitened.status, False, PRECISION)


@triton.jit
def repeat_chunk(
    given, i_b, memory, first, end,
    READ_BEFORE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What the forward knew of steps [first, end), from the memory before them. Ends with a barrier."""
    K, C = afresh(given.K, first, ALIGNED), afresh(given.C, first, ALIGNED)
    parts = parts_of(given, i_b, K, C, CHUNK)
    steps = steps_of(given.steps, i_b, first, end, given.T, K, C, ALIGNED)
    before = memory_in(parts.saved, memory, K)
    whitened = whiten_chunk(parts.chunk, before, steps, True, PRECISION, CHUNK)
    return whitened, find_read_variance(parts.chunk, whitened, READ_BEFORE, CHUNK)


@triton.jit
def chunk_backward(
    to, parts, memory, steps, whitened, reported,
    READ_BEFORE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Backward of one chunk, from the memory before it. Returns what reaches u. Ends with a barrier."""
    o = tl.arange(0, CHUNK)
    decay = whitened.decay
    to_log_scale, to_prior_var = tl.zeros((CHUNK,), tl.float32), tl.full((), 0, tl.float32)
    if len(steps.forgetting) != 0:
        scale_memory_cotangent(to.cov, decay.growth)
    product(parts.to_gain, parts.chunk.gain, to.cov, scale=-2.0)
    if len(steps.forgetting) != 0:
        to_log_scale += tl.where(o == CHUNK - 1, growth_cotangent(to, parts, memory), 0.0)
    back_through_memory(to, parts, reported, decay, PRECISION, CHUNK)
    back_through_reads(parts, reported, READ_BEFORE, PRECISION, CHUNK)
    back_through_factor(parts, whitened, reported, PRECISION, CHUNK)
    if len(steps.forgetting) != 0:
        to_log_scale += scaled_values_cotangents(parts, steps, whitened, reported, PRECISION, CHUNK)
    if len(steps.retention) != 0:
        at_end, of_prior_var = end_cotangents(to, parts, memory, decay, steps.prior_var)
        to_log_scale += tl.where(o == CHUNK - 1, at_end, 0.0)
        to_prior_var += of_prior_var
    back_through_projections(parts, memory, decay, reported, PRECISION, CHUNK)
    back_to_memory(to, parts, decay, PRECISION)
    to_log_scale += scale_inputs(parts, decay.scale, CHUNK)
    if len(steps.retention) != 0:
        of_drift, of_prior_var = drift_cotangents(parts, whitened, reported, steps.prior_var, CHUNK)
        store_decay_cotangents(to.retention, to_log_scale + of_drift, decay.factor, 1.0, steps, CHUNK)
        to_prior_var += of_prior_var
    elif len(steps.forgetting) != 0:
        store_decay_cotangents(to.forgetting, to_log_scale, decay.factor, -0.5, steps, CHUNK)
    store_vector(to.noise, to_noise_of(parts, whitened, reported, CHUNK), places_of(steps, o))
    store_rows(to, parts, decay, steps, CHUNK)
    return to_prior_var


@triton.jit
def store_rows(to, parts, decay, steps, CHUNK: tl.constexpr):
    """The gradients of weights, queries and values. Nothing flows back to a pattern that is masked."""
    o = tl.arange(0, CHUNK)
    m_written, count = written_rows(steps, o)[:, None], steps.end - steps.first
    to_weights, to_queries = rows_from(to.weights, steps.first, count), rows_from(to.queries, steps.first, count)
    for k in range(0, to.weights.columns, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        store_tile(to_weights, tl.where(m_written, load_tile(parts.to_inputs, o, o_k), 0.0), o, o_k)
        store_tile(to_queries, load_tile(rows_from(parts.to_inputs, CHUNK, CHUNK), o, o_k), o, o_k)
    to_values = rows_from(to.z, steps.first, count)
    for c in range(0, to.z.columns, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        tile = -decay.value_scale[:, None] * load_tile(parts.to_values, o, o_c)
        store_tile(to_values, tl.where(m_written, tile, 0.0), o, o_c)
    tl.debug_barrier()


# ------------------------------------------------------------------------------------------------------------ launcher


def memories_of(T: int, chunk: int, forgets: bool) -> int:
    """How many memories are kept: one a segment, and with forgetting those of a segment whose chunks are single steps.

    The first chunk of a segment starts from that of the segment.
    """
    return -(-T // chunk) + (min(T, chunk) if forgets else 0)


@implements("filter_posterior_backward")
def filter_backward(
    mean, cov, weights, values, queries, noise_var, retention, prior_var, forgetting, read_before, mask, precision,
    grad_mean, grad_cov, grad_values, grad_variance, grad_innovation_var, grad_log_evidence,
):  # fmt: skip
    (B, K, C), T, chunk = mean.shape, weights.shape[1], chunk_of(weights.shape[1])
    inputs = (mean, cov, weights, values, queries, noise_var, retention, prior_var, forgetting)
    to = Gradients(*(None if x is None else x.new_empty(x.shape) for x in inputs))
    returned = tuple(mean.new_empty(0) if x is None else x for x in to)
    if not B:
        return returned
    laws = [None if x is None else vectors(x) for x in (to.retention, to.forgetting)]
    in_kernel = to._replace(retention=laws[0], forgetting=laws[1])
    grads = Cotangents(
        *map(matrices, (grad_mean, grad_cov, grad_values)),
        *map(vectors, (grad_variance, grad_innovation_var)),
        None if grad_log_evidence is None else numbers(grad_log_evidence),
    )
    steps = steps_as_arguments(weights, values, queries, noise_var, retention, prior_var, forgetting, mask)
    memories = max(1, memories_of(T, chunk, forgetting is not None))
    filter_backward_kernel[(B,)](
        matrices(mean), matrices(cov), steps, grads, in_kernel,
        workspace(mean, B, filter_backward_layout, K, C, memories, chunk), K, C, T, memories,
        READ_BEFORE=read_before, PRECISION=precision_of(precision),
        ALIGNED=rows_aligned(mean, cov, weights, values, queries), CHUNK=chunk, **options_of_a_head(),
    )  # fmt: skip
    return returned
