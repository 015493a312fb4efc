"""Forward kernel of filter_posterior: one launch, one program a memory, chunk by chunk."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkm._linalg.triton.factor import load_symmetric
from fastkm._linalg.triton.launch import (
    implements,
    mask_vectors,
    matrices,
    numbers,
    precision_of,
    rows_aligned,
    vectors,
    warps,
    workspace,
)
from fastkm._linalg.triton.tiles import (
    BLOCK,
    assume_aligned,
    copy,
    matrix_of,
    result_of,
    results_of,
    rows_from,
    store_tile,
)
from fastkm._linalg.triton.vectors import store_vector
from fastkm.filtering.triton.chunk import (
    Memory,
    advance_memory,
    chunk_layout,
    find_read_variance,
    log_evidence_of,
    read_tile,
    whiten_chunk,
)
from fastkm.filtering.triton.steps import (
    Steps,
    afresh,
    bounds_of_chunk,
    cut_segment,
    places_of,
    steps_of,
    steps_without_none,
    written_rows,
)


class Results(NamedTuple):
    """What a filter returns."""

    mean: Any
    cov: Any
    read_values: Any
    variance: Any
    s: Any
    log_evidence: Any
    status: Any


@triton.jit
def filter_kernel(
    mean, cov, steps, to, workspaces, K, C, T,
    READ_BEFORE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A sequence of steps through one memory.

    Bytes moved: the arguments in and the results out, each once. The memory, which lies where the result goes, and the
    workspace of a chunk are read and written again for every chunk. Both together have 140 KiB at K = C = 64 and 324
    KiB at 128, so they stay in the caches, the smaller in that of the multiprocessor.
    """
    i_b, steps = tl.program_id(0).to(tl.int64), steps_without_none(steps)
    status = load_symmetric(result_of(to.cov, i_b, K, K), matrix_of(assume_aligned(cov, ALIGNED), i_b, K, K))
    copy(result_of(to.mean, i_b, K, C), matrix_of(assume_aligned(mean, ALIGNED), i_b, K, C))
    log_evidence = tl.full((), 0, tl.float64)
    sequence = steps_of(steps, i_b, 0, T, T, K, C, ALIGNED)
    for segment in range(0, T, CHUNK):
        chunks, of_step = cut_segment(sequence, segment, CHUNK)
        for i in range(chunks):
            first, end = bounds_of_chunk(of_step, i, segment, T)
            K_now, C_now = afresh(K, first, ALIGNED), afresh(C, first, ALIGNED)
            now, evidence = filter_chunk(
                results_of_memory(to, i_b, T, K_now, C_now),
                chunk_layout(workspaces.p + i_b * workspaces.s_b, K_now, C_now, CHUNK),
                steps_of(steps, i_b, first, end, T, K_now, C_now, ALIGNED),
                READ_BEFORE, PRECISION, CHUNK,
            )  # fmt: skip
            log_evidence += evidence
            status = tl.where(status == 0, now, status)
    tl.store(to.log_evidence + i_b, log_evidence.to(tl.float32))
    tl.store(to.status + i_b, status)


@triton.jit
def results_of_memory(to, i_b, T, K, C):
    """Where the results of memory ``i_b`` go, but for the two numbers."""
    return Results(
        result_of(to.mean, i_b, K, C),
        result_of(to.cov, i_b, K, K),
        result_of(to.read_values, i_b, T, C),
        results_of(to.variance, i_b, T),
        results_of(to.s, i_b, T),
        (),
        (),
    )


@triton.jit
def filter_chunk(to, parts, steps, READ_BEFORE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk, with the memory where its result goes. Returns their status and log evidence."""
    memory = Memory(to.mean, to.cov)
    whitened = whiten_chunk(parts, memory, steps, True, PRECISION, CHUNK)
    evidence = report_chunk(to, parts, whitened, steps, READ_BEFORE, PRECISION, CHUNK)
    FORGETS: tl.constexpr = len(steps.forgetting) != 0
    return advance_memory(memory, parts, whitened.decay, whitened.status, FORGETS, PRECISION), evidence


@triton.jit
def report_chunk(
    to, parts, whitened, steps, READ_BEFORE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Store the reads of a chunk, their variances, and s; returns its log evidence."""
    o = tl.arange(0, CHUNK)
    o_t = places_of(steps, o)
    C = parts.error.columns
    variance = find_read_variance(parts, whitened, READ_BEFORE, CHUNK)
    store_vector(to.variance, tl.maximum(variance, 0.0), o_t)
    store_vector(to.s, whitened.pivots, o_t)
    read_values = rows_from(to.read_values, steps.first, steps.end - steps.first)
    for c in range(0, C, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        tile = read_tile(parts, o, o_c, PRECISION, CHUNK)
        store_tile(read_values, tile / whitened.decay.value_scale[:, None], o, o_c)
    return log_evidence_of(parts, whitened, written_rows(steps, o), C, CHUNK)


# ------------------------------------------------------------------------------------------------------------ launcher


def chunk_of(T: int) -> int:
    """Rows of a chunk: a short call, such as one step of decoding, computes with fewer."""
    return 16 if T <= 16 else BLOCK.value


def options_of_a_head() -> dict[str, int]:
    """One program has a multiprocessor for itself: a memory is a head, and heads are fewer than multiprocessors.

    Eight warps leave a thread 8 numbers of the largest tile. AMD's are twice as wide.
    """
    return warps(4) if torch.version.hip else warps(8, registers=255)


def steps_as_arguments(
    weights, values, queries, noise_var, retention, prior_var, forgetting, mask
) -> Steps:  # fmt: skip
    return Steps(
        matrices(weights), matrices(values), matrices(queries), vectors(noise_var), vectors(retention),
        vectors(forgetting), mask_vectors(mask), numbers(prior_var),
    )  # fmt: skip


@implements("filter_posterior")
def filter_launcher(
    mean: Tensor, cov: Tensor, weights: Tensor, values: Tensor, queries: Tensor, noise_var: Tensor,
    retention: Tensor | None, prior_var: Tensor, forgetting: Tensor | None, read_before: bool, mask: Tensor | None,
    precision: int,
):  # fmt: skip
    (B, K, C), T = mean.shape, weights.shape[1]
    to = Results(
        mean.new_empty(mean.shape),
        mean.new_empty(cov.shape),
        mean.new_empty(B, T, C),
        mean.new_empty(B, T),
        mean.new_empty(B, T),
        mean.new_empty(B),
        mean.new_empty(B, dtype=torch.int32),
    )
    if not B:
        return tuple(to)
    steps = steps_as_arguments(weights, values, queries, noise_var, retention, prior_var, forgetting, mask)
    chunk = chunk_of(T)
    filter_kernel[(B,)](
        matrices(mean), matrices(cov), steps, to, workspace(mean, B, chunk_layout, K, C, chunk), K, C, T,
        READ_BEFORE=read_before, PRECISION=precision_of(precision),
        ALIGNED=rows_aligned(mean, cov, weights, values, queries), CHUNK=chunk, **options_of_a_head(),
    )  # fmt: skip
    return tuple(to)
