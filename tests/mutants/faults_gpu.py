"""Faults in the kernels for GPUs; without one the CUDA kernels run on the host and the Triton ones interpreted."""

from functools import partial

from mutants.fault import Fault

cuda, triton = partial(Fault, place="cuda"), partial(Fault, place="triton")

UPDATE = "tests/gpu/test_posterior.py::test_update_equals_one_rank_one_step_per_pattern"
UPDATE_GRADIENT = "tests/gpu/test_posterior.py::test_gradients"
MASKED = "tests/gpu/test_posterior.py::test_what_a_masked_pattern_holds_is_never_read"
WRITE = "tests/gpu/test_writing.py::test_each_pattern_is_addressed_then_stored"
WRITE_GRADIENT = "tests/gpu/test_writing.py::test_gradients"
READ = "tests/gpu/test_reading.py::test_every_read_out_is_the_next_query"
READ_GRADIENT = "tests/gpu/test_reading.py::test_gradients"
FILTER = "tests/gpu/test_filtering.py::test_filter_equals_the_steps"
FILTER_GRADIENT = "tests/gpu/test_filtering.py::test_gradients"
KL = "tests/gpu/test_matrix_normal.py::test_kl_is_the_sum_over_columns"
REMOVAL = "tests/gpu/test_removal.py::test_equals_the_definition"
REMOVAL_GRADIENT = "tests/gpu/test_removal.py::test_gradients"
REFUSED = "tests/gpu/test_removal.py::test_each_memory_that_is_refused_is_named_with_its_reason"
NAMED = "tests/gpu/test_matrix_normal.py::test_a_covariance_that_is_none_is_named"

CUDA = [
    cuda(
        "cuda-update-evidence-of-masked",
        "masked patterns count in the log evidence",
        before="is_unmasked(args, b, t)",
        within="if (is_unmasked(args, b, t)) log_evidence",
        after="true",
        tests=(UPDATE,),
    ),
    cuda(
        "cuda-update-masked-values",
        "the values of a masked pattern are loaded as they are",
        before="update.unmasked[t] ? columns - column : 0",
        after="t < count ? columns - column : 0",
        tests=(MASKED,),
    ),
    cuda(
        "cuda-update-backward-gain-factor",
        "the cotangent of the gain lacks its factor of two",
        before="AddRows{chunk.grad_projected, width, K, -2}",
        after="AddRows{chunk.grad_projected, width, K, -1}",
        tests=(UPDATE_GRADIENT,),
    ),
    cuda(
        "cuda-update-missing-barrier",
        "threads whiten errors before all of them are stored",
        before="__syncthreads();",
        within="whitening.store(AddRows{update.whitened, kLd, kColumns, -1}); __syncthreads();",
        after=";",
        tests=("tests/simt/test_planted_bugs.py::test_kernels_are_clean",),
    ),
    cuda(
        "cuda-removal-shrinks-covariance",
        "the covariance loses what a removal gives back",
        before="kRemoves ? 1 : -1",
        after="kRemoves ? -1 : -1",
        tests=(REMOVAL,),
    ),
    cuda(
        "cuda-removal-digits-not-asked",
        "a removal of which rounding leaves nothing is served",
        before="rounding * size * inverse_variance <= 1 && rounding * left * left <= 1 ? kGood : kUntold",
        after="kGood",
        tests=(REFUSED,),
    ),
    cuda(
        "cuda-replacement-forgets-the-update",
        "the status of the removal replaces that of the update before it",
        before="launch_removal(removal, B, true, context)",
        after="launch_removal(removal, B, false, context)",
        tests=("tests/gpu/test_removal.py::test_a_replacement_refuses_what_an_update_refuses",),
    ),
    cuda(
        "cuda-read-backward-first-share",
        "of blocks that share a memory the first one's sums are left out",
        before="0",
        within="for (int64_t share = 0; share < plan.blocks_per_memory; ++share) total += first[share",
        after="1",
        tests=(READ_GRADIENT,),
    ),
    cuda(
        "cuda-write-woodbury-ridge",
        "Woodbury's matrix divides by λ where it must divide by λ²",
        before="d / (ridge * ridge)",
        after="d / ridge",
        tests=(WRITE,),
    ),
    cuda(
        "cuda-kl-last-tile-only",
        "only the last tile of columns counts in the distance of the means",
        before="distance += squared_norm(divergence.tile, cov.size, count, kColumns, divergence);",
        after="distance = squared_norm(divergence.tile, cov.size, count, kColumns, divergence);",
        tests=(KL,),
    ),
    cuda(
        "cuda-kl-status-of-the-covariance",
        "the prior's status replaces that of the covariance",
        before="max(status, divergence.worst)",
        after="status",
        tests=(NAMED,),
    ),
    cuda(
        "cuda-filter-read-before",
        "a read before the write sees the pattern of its own step",
        before="j < i || (j == i && !chunk.read_before)",
        within="= j < i || (j == i && !chunk.read_before) ? sum : 0",
        after="j <= i",
        tests=(FILTER,),
    ),
    cuda(
        "cuda-filter-retention-of-masked",
        "a masked step decays",
        before="is_unmasked(args.posterior, b, t)",
        within="factors.data && is_unmasked(args.posterior, b, t)",
        after="true",
        tests=(FILTER,),
    ),
    cuda(
        "cuda-filter-chunk-never-cut",
        "with forgetting a chunk is not cut where it loses digits",
        before="left * kMostGrowth < 1",
        after="left * kMostGrowth < 0",
        tests=("tests/gpu/test_filtering.py::test_forgetting_loses_no_digits",),
    ),
    cuda(
        "cuda-filter-evidence-of-variances",
        "the evidence lacks what the variances give",
        before="tile <= sharing.tiles",
        within="for (int64_t tile = 0; tile <= sharing.tiles; ++tile) sum += chunk.evidence",
        after="tile < sharing.tiles",
        tests=(FILTER,),
    ),
    cuda(
        "cuda-filter-columns-of-another-share",
        "a thread block reads the values of the first one's columns",
        before="chunk.column0 + column",
        within="values.load_four(chunk.first + t, chunk.column0 + column",
        after="column",
        tests=(FILTER,),
    ),
    cuda(
        "cuda-filter-missing-barrier",
        "the gain of reads is squared before all of it is stored",
        before="__syncthreads();",
        within="!chunk.read_before) ? sum : 0; __syncthreads();",
        after=";",
        tests=("tests/simt/test_planted_bugs.py::test_kernels_are_clean",),
    ),
    cuda(
        "cuda-filter-backward-drift",
        "weights receive the half of what passes through the drift",
        before="2 * square * (j <= i ? chunk.drift[i][j] : chunk.drift[j][i])",
        after="square * (j <= i ? chunk.drift[i][j] : chunk.drift[j][i])",
        tests=(FILTER_GRADIENT,),
    ),
    cuda(
        "cuda-filter-backward-first-chunk",
        "a chunk inside a segment starts from the memory of the segment's last one",
        before="n + 1 < chunks",
        within="if (n + 1 < chunks) keep_memory",
        after="n + 1 < 0",
        tests=(FILTER_GRADIENT,),
    ),
    cuda(
        "cuda-filter-backward-energy",
        "the evidence passes nothing to the errors",
        before="scaled(-chunk.to_evidence[t], four_at(chunk.residual, at))",
        after="scaled(0, four_at(chunk.residual, at))",
        tests=(FILTER_GRADIENT,),
    ),
]

TRITON = [
    triton(
        "triton-update-evidence-of-masked",
        "masked patterns count in the log evidence",
        before="tl.where(m_written, 0.5 * (C * tl.log(b_s * TWO_PI) + total), 0.0)",
        after="0.5 * (C * tl.log(b_s * TWO_PI) + total)",
        tests=(UPDATE,),
    ),
    triton(
        "triton-masked-pattern-written",
        "a masked pattern is written as any other",
        before="m_t & (load_vector(mask, o_t, 0) != 0)",
        after="m_t & (load_vector(mask, o_t, 0) >= 0)",
        tests=(MASKED,),
    ),
    triton(
        "triton-update-pivot-not-scaled",
        "the gain is divided by s in place of √s where the state is in registers",
        before="g = a / tl.sqrt(b_s)",
        after="g = a / b_s",
        tests=(UPDATE,),
    ),
    triton(
        "triton-read-one-iteration-too-many",
        "a read iterates once more than it is asked to",
        before="for _ in range(1, num_iters)",
        within="for _ in range(1, num_iters): solve_rows(",
        after="for _ in range(num_iters)",
        tests=(READ,),
    ),
    triton(
        "triton-removal-digits-not-asked",
        "a removal of which rounding leaves nothing is served",
        before="tl.where(tl.min(told.to(tl.int32), 0) == 0, IS_UNTOLD, 0)",
        after="tl.where(tl.min(told.to(tl.int32), 0) == 0, 0, 0)",
        tests=(REFUSED,),
    ),
    triton(
        "triton-removal-backward-sign",
        "the cotangent of the covariance keeps the sign of an update",
        before="product(to.cov, transposed(parts.weights), parts.to_projected, scale=0.5 * SIGN, accumulate=True)",
        after="product(to.cov, transposed(parts.weights), parts.to_projected, scale=0.5, accumulate=True)",
        tests=(REMOVAL_GRADIENT,),
    ),
    triton(
        "triton-read-backward-ridge",
        "the gradient of the ridge has the wrong sign",
        before="to_ridge -= dot(rows.to_weights, solution)",
        after="to_ridge += dot(rows.to_weights, solution)",
        tests=(READ_GRADIENT,),
    ),
    triton(
        "triton-write-backward-factor",
        "the cotangent of c lacks a factor of two",
        before="2 * gram_r + 2 * delta_delta * gram_c - s * cov_c",
        after="2 * gram_r + delta_delta * gram_c - s * cov_c",
        tests=(WRITE_GRADIENT,),
    ),
    triton(
        "triton-kl-last-block-only",
        "only the last block counts in the distance of the means",
        before="shift += squared_norm(total)",
        after="shift = squared_norm(total)",
        tests=(KL,),
    ),
    triton(
        "triton-asymmetry-unnoticed",
        "a covariance that is not symmetric is not reported",
        before="tl.where(gap > scale * SQRT_EPS, IS_ASYMMETRIC, 0))",
        within="tl.debug_barrier() return tl.where(finite == 0, IS_INDEFINITE,"
        " tl.where(gap > scale * SQRT_EPS, IS_ASYMMETRIC, 0))",
        after="0)",
        tests=(NAMED,),
    ),
    triton(
        "triton-filter-read-before",
        "a read before the write sees the pattern of its own step",
        before="tl.where(o[:, None] > o[None, :], tile, 0.0)",
        within="if READ_BEFORE: tile = tl.where(o[:, None] > o[None, :], tile, 0.0) else:"
        " tile = tl.where(o[:, None] >= o[None, :], tile, 0.0) store_tile(parts.read_gain",
        after="tl.where(o[:, None] >= o[None, :], tile, 0.0)",
        tests=(FILTER,),
    ),
    triton(
        "triton-filter-retention-of-masked",
        "a masked step decays",
        before="tl.where(written_rows(steps, o), load_vector(factors, steps.first + o, 1.0), 1.0)",
        after="tl.where(steps.first + o < steps.end, load_vector(factors, steps.first + o, 1.0), 1.0)",
        tests=(FILTER,),
    ),
    triton(
        "triton-filter-chunk-never-cut",
        "with forgetting a chunk is not cut where it loses digits",
        before="left * factor * MOST_GROWTH < 1",
        after="left * factor * MOST_GROWTH < 0",
        tests=("tests/gpu/test_filtering.py::test_forgetting_loses_no_digits",),
    ),
    triton(
        "triton-filter-relaxed-end",
        "the memory after a chunk lacks what it relaxes to",
        before="tl.where(o_i[:, None] == o_j[None, :], decay.end_relaxed, 0.0)",
        after="tl.where(o_i[:, None] == o_j[None, :], 0.0, 0.0)",
        tests=(FILTER,),
    ),
    triton(
        "triton-filter-backward-drift",
        "weights receive the half of what passes through the drift",
        before="2 * squares * drift",
        after="squares * drift",
        tests=(FILTER_GRADIENT,),
    ),
    triton(
        "triton-filter-backward-first-chunk",
        "a chunk inside a segment starts from the memory of the segment",
        before="tl.where(i == 0, n, segments + i)",
        after="n",
        tests=(FILTER_GRADIENT,),
    ),
    triton(
        "triton-filter-backward-energy",
        "the evidence passes nothing to the errors",
        before="-reported.log_evidence / (decay.value_scale",
        after="0 * reported.log_evidence / (decay.value_scale",
        tests=(FILTER_GRADIENT,),
    ),
]
