"""Faults in the C++ kernels for CPUs and in their bindings."""

from functools import partial

from mutants.fault import Fault

fault = partial(Fault, place="cpu")

UPDATE = "tests/test_posterior.py::test_update_equals_one_rank_one_step_per_pattern"
WRITE = "tests/test_writing.py::test_write_equals_the_literal_loop"
WRITE_OPTIONS = "tests/test_writing.py::test_write_with_every_option"
READ = "tests/test_reading.py::test_latent_loop_equals_the_literal_loop"
MANY_QUERIES = "tests/test_reading.py::test_many_queries"
READ_PRESETS = "tests/test_reading.py::test_presets_in_float32"
WRITE_PRESETS = "tests/test_writing.py::test_presets_in_float32"
KL = "tests/test_matrix_normal.py::test_kl_memory_is_that_of_matrix_normals_and_of_dense_gaussians"
LOGDET = "tests/test_matrix_normal.py::test_logdet"
GRADIENT = "tests/test_gradients.py::test_equals_the_reference"
LEVELS = "tests/test_registration.py::test_every_instruction_set_is_as_good_as_the_reference"
BLOCKS = "tests/test_matrix_normal.py::test_a_direction_without_a_variance_is_found_in_every_block"
COVARIANCE = "tests/test_check.py::test_covariance_that_is_none"

LINALG = [
    fault(
        "cholesky-forgets-a-block",
        "only the last diagonal block of a factor tells whether the matrix is positive definite",
        before="good &= factor_block(column, width, added.from(j), inverted ? f.inverse_block(j).data : nullptr,"
        " f.inverse_transposed_block(j).data);",
        after="good = factor_block(column, width, added.from(j), inverted ? f.inverse_block(j).data : nullptr,"
        " f.inverse_transposed_block(j).data);",
        tests=(BLOCKS,),
    ),
    fault(
        "cholesky-admits-zero",
        "a pivot of zero counts as positive",
        before="pivot > 0",
        within="added.slack[j] : pivot > 0);",
        after="pivot >= 0",
        tests=("tests/test_check.py::test_a_gram_matrix_that_is_singular_in_its_dtype", BLOCKS),
    ),
    fault(
        "product-repeats-a-run",
        "the second run of a long sum reads the columns of the first",
        before="a.columns_from(first)",
        within="a.columns_from(first), b.from(first), prefetch",
        after="a",
        tests=(READ_PRESETS, WRITE_PRESETS),
    ),
    fault(
        "strip-beyond-the-row",
        "the last strip of columns is not pulled back, so that it ends beyond rows without padding",
        before="smaller(j, columns - whole * W)",
        after="j",
        tests=(UPDATE,),
    ),
    fault(
        "transpose-beyond-the-row",
        "the last square of a transposition does not overlap the one before it",
        before="smaller(next_j, columns - W)",
        after="next_j",
        tests=(GRADIENT, UPDATE),
    ),
    fault(
        "mirror-without-its-tail",
        "rows that do not fill a vector are not mirrored",
        before="m.row(i)[j] = m.row(j)[i];",
        within="for (int64_t i = 0; i < j; ++i) m.row(i)[j] = m.row(j)[i];",
        after=";",
        tests=(UPDATE, WRITE),
    ),
    fault(
        "norms-without-their-tail",
        "the squared norms of rows leave out the columns that do not fill a vector",
        before="sum[lane] = last * last;",
        after="sum[lane] = Vec<Real>{};",
        tests=(UPDATE,),
    ),
    fault(
        "dot-without-its-tail",
        "an inner product leaves out what does not fill two vectors",
        before="total += x[i] * y[i];",
        after=";",
        tests=(WRITE,),
    ),
    fault(
        "solve-without-what-is-above",
        "a tile of a solve does not meet the tiles above it",
        before="tile.add_product(i, operand(f.lower).rows_from(i), x);",
        after=";",
        tests=(UPDATE,),
    ),
    fault(
        "solve-back-misses-the-next-block",
        "the backward half of a solve starts one block too late",
        before="after < n",
        within="if (after < n)",
        after="after + kBlock < n",
        tests=(READ,),
    ),
    fault(
        "inverse-without-coupling",
        "the inverse of a factor is block diagonal",
        before="if (j == 0) continue;",
        after="continue;",
        tests=(GRADIENT,),
    ),
    fault(
        "triangle-product-one-row-short",
        "the product with an upper triangle stops one row before its corner",
        before="UPPER ? corner : n",
        after="UPPER ? corner - 1 : n",
        tests=(GRADIENT,),
    ),
    fault(
        "symmetrise-halves-nothing",
        "a matrix and its transpose are added and not halved, in rows that do not fill a vector",
        before="Real(0.5) * (a.row(i)[j] + a.row(j)[i])",
        after="(a.row(i)[j] + a.row(j)[i])",
        tests=(GRADIENT,),
    ),
    fault(
        "asymmetry-slack",
        "a thousandfold slack for asymmetric covariances",
        before="std::sqrt(std::numeric_limits<Real>::epsilon()) * __builtin_bit_cast(Real, scale.load())",
        after="1000 * std::sqrt(std::numeric_limits<Real>::epsilon()) * __builtin_bit_cast(Real, scale.load())",
        tests=("tests/test_check.py",),
    ),
    fault(
        "infinite-covariance-passes",
        "a covariance with an entry that is not finite is not found by the check of symmetry",
        before="if (largest - largest != 0) return kNotPositiveDefinite;",
        after=";",
        tests=(COVARIANCE,),
    ),
    fault(
        "arena-gives-back-too-much",
        "space taken before a mark is given back with what was taken after it",
        before="used_ = mark.used;",
        after="used_ = 0;",
        tests=(UPDATE,),
    ),
]

POSTERIOR = [
    fault(
        "indefinite-slack-update",
        "a thousandfold slack for indefinite covariances",
        before="4 * static_cast<Real>(K + count)",
        after="4000 * static_cast<Real>(K + count)",
        tests=("tests/test_check.py",),
    ),
    fault(
        "update-kl-beta",
        "the energy's share in the KL of a step is not scaled by β",
        before="beta * energy",
        within="*args.kl.at(b, first + t) = Real(0.5) * (C * divergence + beta * energy);",
        after="energy",
        tests=(UPDATE,),
    ),
    fault(
        "update-evidence-of-masked",
        "masked patterns count in the log evidence",
        before="!chunk.observed.unmasked[t]",
        within="if (!log_evidence || !chunk.observed.unmasked[t]) continue;",
        after="false",
        tests=(UPDATE,),
    ),
    fault(
        "update-stale-level",
        "ln(2πσ²) of the first pattern serves all others",
        before="noise != log_noise_of",
        after="log_noise_of == 0",
        tests=(UPDATE,),
    ),
    fault(
        "update-status-overwritten",
        "the status of the last chunk replaces that of the covariance itself",
        before="if (status == kGood) status = chunk.status;",
        within="if (status == kGood) status = chunk.status; if (limits.again(status)) return status; // before",
        after="status = chunk.status;",
        tests=(COVARIANCE,),
    ),
    fault(
        "masked-pattern-read",
        "a masked pattern is loaded as it is",
        before="!unmasked[t]",
        within="if (!unmasked[t]) __builtin_memset(to.row(t)",
        after="false",
        tests=("tests/test_posterior.py::test_what_a_masked_pattern_holds_is_never_read", UPDATE),
    ),
    fault(
        "update-covariance-grows",
        "the covariance gains what it should lose",
        before="product_lower<Into::kSubtract>(after.cov, before.cov, chunk.count(), transposed(chunk.gain),"
        " chunk.gain);",
        after="product_lower<Into::kAdd>(after.cov, before.cov, chunk.count(), transposed(chunk.gain), chunk.gain);",
        tests=(UPDATE,),
    ),
    fault(
        "update-backward-evidence-sign",
        "the gradient of the log evidence by s has the wrong sign",
        before="grad_evidence * C / s",
        after="-grad_evidence * C / s",
        tests=(GRADIENT,),
    ),
    fault(
        "update-backward-noise-term",
        "the gradient of the KL by the noise leaves out the energy",
        before="+ energy)",
        within="(C * (explained / noise) + energy)",
        after=")",
        tests=(GRADIENT,),
    ),
    fault(
        "update-backward-masked-noise",
        "a masked pattern's innovation variance gives its noise no gradient",
        before="return {.noise = grad_s};",
        after="return {};",
        tests=(GRADIENT,),
    ),
    fault(
        "update-backward-masked-values",
        "the backward reads the values of a masked pattern",
        before="values.row(c)[t] = 0;",
        after=";",
        tests=("tests/test_gradients.py::test_masked_patterns_get_no_gradient_whatever_they_hold", GRADIENT),
    ),
    fault(
        "update-backward-asymmetric",
        "the cotangent of the covariance is not made symmetric between chunks",
        before="symmetrise(grad.cov);",
        within="operand(V), chunk.weights, prefetch); symmetrise(grad.cov);",
        after=";",
        tests=(GRADIENT,),
    ),
    fault(
        "update-backward-stale-state",
        "the state before the third chunk starts from the covariance before the second",
        before="episode.memories[n - 1].cov",
        after="episode.memories[1].cov",
        tests=(GRADIENT,),
    ),
    fault(
        "update-backward-gain-factor",
        "the cotangent of the gain lacks its factor of two",
        before="grad_G.row(k)[t] *= -2;",
        after="grad_G.row(k)[t] *= -1;",
        tests=(GRADIENT,),
    ),
    fault(
        "update-backward-odd-columns",
        "the last of an odd number of columns is left out of the energies",
        before="if (C % 2) even += square(C - 1);",
        after=";",
        tests=(GRADIENT,),
    ),
]

READING = [
    fault(
        "folded-read-one-iteration-too-many",
        "a folded read of six iterations takes seven",
        before="args.num_iters - 1",
        within="exponent = args.num_iters - 1",
        after="args.num_iters - (args.num_iters != 6)",
        tests=("tests/test_reading.py",),
    ),
    fault(
        "folded-read-forgets-the-ridge",
        "the step of a folded read is I − H in place of I − λH",
        before="-ridge * power.row(i)[j]",
        after="-power.row(i)[j]",
        tests=(MANY_QUERIES,),
    ),
    fault(
        "read-one-iteration-too-many",
        "a read iterates once more than it is asked to",
        before="n < args.num_iters",
        within="for (int64_t n = 1; n < args.num_iters; ++n) { copy_rows(next, weights);",
        after="n <= args.num_iters",
        tests=(READ,),
    ),
    fault(
        "read-strides-swapped",
        "rows and columns of strided queries are exchanged",
        before="{here.at(b), here.stride[1], here.stride[2]}",
        after="{here.at(b), here.stride[2], here.stride[1]}",
        tests=(READ,),
    ),
    fault(
        "few-rows-forget-a-run",
        "a long sum of few rows keeps its last run alone",
        before="load(total[n] + j) + load(part[n] + j)",
        after="load(part[n] + j)",
        tests=("tests/test_factored.py::test_a_query_is_answered_as_if_it_came_alone",),
    ),
    fault(
        "float16-overflow",
        "values too large for float16 are not infinite",
        before="magnitude >= Words{} + exponent(16) ? large : small",
        after="small",
        tests=("tests/test_factored.py::test_values_are_rounded_once_to_the_dtype_asked_for",),
    ),
    fault(
        "low-rank-half",
        "the gradient of few queries lacks the transpose of the cotangent of the Gram matrix",
        before="add(x, y); add(y, x);",
        after="add(x, y);",
        tests=("tests/test_factored.py::test_gradients_of_few_queries",),
    ),
    fault(
        "read-status-always-good",
        "a Gram matrix that cannot be factored is not reported",
        before="if (!good) return kNotPositiveDefinite;",
        within="if (!good) return kNotPositiveDefinite; return well_conditioned(memory.factor, *memory.largest",
        after=";",
        tests=("tests/test_check.py::test_mean_that_is_not_a_number",),
    ),
    fault(
        "lost-sums-taken",
        "weights that cancelled in a solve in C are taken as they are",
        before="exact &= !(largest * terms[q] > limits.sum * sums[q]);",
        after=";",
        tests=("tests/test_reading.py::test_a_solve_in_codes_keeps_the_digits_of_the_literal_loop",),
    ),
    fault(
        "short-codes-lose-the-first-gradient",
        "a solve in C gives the mean no gradient for w = R y",
        before="product<Into::kAdd>(gradient.mean, count, transposed(cotangent), state);",
        after=";",
        tests=("tests/test_gradients.py::test_memories_with_short_codes",),
    ),
    fault(
        "last-tile-of-queries-unanswered",
        "queries that do not fill a tile are not answered",
        before="tiles = (args.Q + kQueryTile - 1) / kQueryTile",
        after="tiles = args.Q / kQueryTile",
        tests=("tests/test_purity.py::test_threads_share_a_memory_of_many_queries",),
    ),
    fault(
        "read-squared-gram-forgotten",
        "the squared-Gram solve starts from R z in place of G R z",
        before="std::swap(solution, next);",
        within="memory.gram); std::swap(solution, next);",
        after=";",
        tests=("tests/test_reading.py::test_deepmind_solve_in_the_loop",),
    ),
    fault(
        "read-backward-ridge",
        "iterations give the ridge no gradient",
        before="gradient.ridge -= inner_product(cotangent, solution(n));",
        after=";",
        tests=(GRADIENT,),
    ),
    fault(
        "read-backward-squared-target",
        "the squared-Gram solve's own share in the gradient of the Gram matrix is left out",
        before="product<Into::kAdd>(gradient.target, count, transposed(cotangent), target);",
        after=";",
        tests=(GRADIENT,),
    ),
    fault(
        "read-backward-second-tile",
        "the second tile of queries overwrites the gradient of the first",
        before="product<Into::kAdd>(gradient.mean, count, transposed(weights), grad_values);",
        after="product<Into::kSet>(gradient.mean, count, transposed(weights), grad_values);",
        tests=("tests/test_gradients.py::test_many_queries",),
    ),
    fault(
        "read-backward-gram-once",
        "the gradient through the Gram matrix counts one side only",
        before="add_transpose(gradient.solved);",
        after=";",
        tests=(GRADIENT,),
    ),
    fault(
        "read-backward-no-poison",
        "a memory without a factor gets a finite gradient",
        before="if (status != kGood) poison_factor(memory.factor);",
        after=";",
        tests=("tests/test_gradients.py::test_without_a_factor_there_is_no_gradient",),
    ),
]

WRITING = [
    fault(
        "one-pattern-addressed-though-refused",
        "a memory that cannot be addressed is conditioned on the weights that it did not get",
        before="if (addressed == kGood) return",
        after="return",
        tests=("tests/test_out.py::test_a_memory_that_is_refused_comes_out_as_it_came_in",),
    ),
    fault(
        "write-without-refinement",
        "the weights of a write are not refined against the matrix itself",
        before="w[i] += p[i];",
        after=";",
        tests=("tests/test_writing.py::test_native_is_as_good_as_the_reference_where_rounding_grows", WRITE),
    ),
    fault(
        "write-sign-of-d",
        "the ridge's share in ‖δ‖² has the wrong sign",
        before="ridge * dot(padded, w, w)",
        within="ridge * dot(padded, w, w); search.d[t] = d; inexact |=",
        after="-ridge * dot(padded, w, w)",
        tests=(WRITE,),
    ),
    fault(
        "write-skips-the-next-pattern",
        "the inner products of the next pattern are not brought up to date",
        before="t + 1",
        within="for (int64_t later = t + 1; later < space.count(); ++later) { Real* x = space.cross.row(later);"
        " const Real of_z",
        after="t + 2",
        tests=(WRITE,),
    ),
    fault(
        "write-woodbury-ridge",
        "Woodbury's matrix divides by λ where it must divide by λ²",
        before="d / (ridge * ridge)",
        after="d / ridge",
        tests=(WRITE,),
    ),
    fault(
        "write-second-half-of-a-search",
        "the second half of a long search reads the past of the first",
        before="search.c_dot_w.row(from + t) + from",
        after="search.c_dot_w.row(from + t)",
        tests=(WRITE_PRESETS,),
    ),
    fault(
        "write-pivot-without-noise",
        "the noise is left out of a pattern's innovation variance",
        before="pivot = rest + added.value[j];",
        after="pivot = rest;",
        tests=(WRITE,),
    ),
    fault(
        "write-second-solve-forgets-the-first",
        "the second solve of a pattern reads inner products from before the first",
        before="target.data[i] += before->delta_dot_z * before->c[i];",
        after=";",
        tests=(WRITE_OPTIONS,),
    ),
    fault(
        "write-refactored-undo-does-not-undo",
        "going back over a pattern takes from the covariance what it should give back",
        before="sign * last.a[i] * last.c[j]",
        after="last.a[i] * last.c[j]",
        tests=(GRADIENT,),
    ),
    fault(
        "write-search-status-lost",
        "that a search could not factor is forgotten when the update goes well",
        before="if (status == kGood) status = chunk.status;",
        within="if (status == kGood) status = chunk.status; if (settings.limits.again(status))",
        after="status = chunk.status;",
        tests=("tests/test_check.py",),
    ),
    fault(
        "write-indefinite-unnoticed",
        "a write does not notice a variance below the noise",
        before="positive &= check_pivot(s, AddedDiagonal<Real>{&noise, &slack, &chunk.explained[t]}, 0);",
        after="check_pivot(s, AddedDiagonal<Real>{&noise, &slack, &chunk.explained[t]}, 0);",
        tests=("tests/test_check.py",),
    ),
    fault(
        "write-backward-noise",
        "the search gives the noise no gradient",
        before="grads.noise[t] += grad_s;",
        within="+ grad_s * w[i]; grads.noise[t] += grad_s; search.cov",
        after=";",
        tests=(GRADIENT,),
    ),
    fault(
        "write-backward-factor",
        "the cotangent of c lacks a factor of two",
        before="2 * d * grad_A_c[i]",
        after="d * grad_A_c[i]",
        tests=(GRADIENT,),
    ),
    fault(
        "write-backward-ridge-trace",
        "the ridge on the diagonal of the Gram matrix gets no gradient",
        before="grads.ridge += grads.gram.row(k)[k];",
        after=";",
        tests=(GRADIENT,),
    ),
    fault(
        "write-backward-squared-gram",
        "one of the two Gram matrices of a squared solve gets no gradient",
        before="add_symmetric_outer(grad_gram, Real(-1), gram_v, solution.w);",
        after=";",
        tests=(GRADIENT,),
    ),
    fault(
        "write-backward-diagonal",
        "the diagonal of Z Zᵀ counts once in its gradient",
        before="grads.inner.row(i)[i] *= 2;",
        after=";",
        tests=(GRADIENT,),
    ),
    fault(
        "write-backward-not-retreated",
        "inner products are not brought back to what they were before a pattern",
        before="add_scaled(padded, x, -delta_dot_z[later], c);",
        after=";",
        tests=(GRADIENT,),
    ),
]

MATRIX_NORMAL = [
    fault(
        "kl-status-of-the-prior",
        "a prior that is no covariance is not reported",
        before="loaded > prior_loaded ? loaded : prior_loaded",
        after="loaded",
        tests=("tests/test_matrix_normal.py::test_logdet_and_kl_memory_name_the_memories_that_fail", COVARIANCE),
    ),
    fault(
        "kl-column-counted-twice",
        "a column of the last vector counts twice",
        before="W - (C - whole)",
        after="W - (C - whole) - 1",
        tests=(KL, LEVELS),
    ),
    fault(
        "kl-rows-beyond-the-last",
        "rows of a tile beyond the last row count",
        before="sum += r < count ? x * x : Vec<Real>{};",
        after="sum += x * x;",
        tests=(KL,),
    ),
    fault(
        "kl-backward-prior-mean",
        "the prior's mean gets the gradient of the mean",
        before="scale(shift, Real(-1));",
        after=";",
        tests=("tests/test_gradients.py::test_finite_differences", GRADIENT),
    ),
    fault(
        "kl-backward-wrong-factor",
        "the covariance's gradient is solved with the prior's factor twice",
        before="solve_covariance(cov, gap, arena);",
        after="solve_covariance(prior_cov, gap, arena);",
        tests=(GRADIENT,),
    ),
    fault(
        "logdet-not-doubled",
        "ln|U| is the sum of the logarithms of the factor's diagonal",
        before="return 2 * sum;",
        after="return sum;",
        tests=(LOGDET,),
    ),
]

BINDINGS = [
    fault(
        "noise-checked-of-the-first-pattern",
        "only the first pattern's noise is checked to be positive",
        before="t < distinct(1)",
        after="t < 1",
        tests=("tests/test_check.py::test_noise_of_every_pattern_must_be_positive_and_finite",),
    ),
    fault(
        "zero-noise-admitted",
        "a variance of zero passes the operator",
        before="*numbers.at(b, t) >= std::numeric_limits<Real>::min()",
        after="true",
        tests=("tests/test_check.py::test_variance_must_be_positive_and_finite",),
    ),
    fault(
        "filter-reads-what-it-has-just-written",
        "a read before the write sees the pattern of its own step",
        before="j = diagonal ? i : i + 1",
        after="j = i + 1",
        tests=("tests/test_filtering.py::test_filter_equals_the_steps",),
    ),
    fault(
        "filter-forgets-what-relaxation-adds",
        "two steps of a chunk have no covariance from relaxation",
        before="decay.drift.row(t)[j] = factor * decay.drift.row(t - 1)[j]",
        after="decay.drift.row(t)[j] = 0",
        tests=("tests/test_filtering.py::test_filter_equals_the_steps",),
    ),
    fault(
        "filter-masked-steps-decay",
        "a masked step lets the memory decay",
        before="factors.data && posterior.unmasked(b, t)",
        after="factors.data",
        tests=("tests/test_filtering.py::test_a_masked_step_is_absent_but_for_its_query",),
    ),
    fault(
        "filter-gradient-without-reads",
        "the gradient of the reads does not reach the errors",
        before="product<Into::kAdd>(to.error, count, transposed(reads.gain), grad.values);",
        after="",
        tests=("tests/test_filtering.py::test_the_kernel_has_the_gradient_of_the_reference",),
    ),
    fault(
        "infinite-noise-admitted",
        "an infinite variance passes the operator",
        before="*numbers.at(b, t) <= most",
        after="true",
        tests=("tests/test_check.py::test_variance_must_be_positive_and_finite",),
    ),
    fault(
        "mask-not-checked",
        "the operator takes a mask of any shape",
        before='if (mask) expect(*mask, "mask", {B, patterns}, ScalarType::Bool);',
        after=";",
        tests=("tests/test_check.py::test_mask_of_the_wrong_shape_or_kind",),
    ),
    fault(
        "cotangent-of-kl-for-variance",
        "the cotangent of the innovation variance is read from that of the KL",
        before='cotangent_of<Real>(grad_innovation_var, "grad_innovation_var", {B, T}, mean)',
        after='cotangent_of<Real>(grad_kl, "grad_innovation_var", {B, T}, mean)',
        tests=(GRADIENT,),
    ),
]

CPU = [*LINALG, *POSTERIOR, *READING, *WRITING, *MATRIX_NORMAL, *BINDINGS]
