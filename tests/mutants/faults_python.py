"""Faults in the package's Python: guards, dispatch, gradients, references, module, model, files and the training."""

from functools import partial

from mutants.fault import Fault

fault = partial(Fault, place="python")

CHECK, BACKEND, TRANSFORMS = "tests/test_check.py", "tests/test_backend.py", "tests/test_transforms.py"
MATRIX_NORMAL, MEMORY, MODELS = "tests/test_matrix_normal.py", "tests/test_memory.py", "tests/test_models.py"
IMAGES = "tests/test_images.py"
READING, STATE, TRAIN = "tests/test_reading.py", "tests/test_state.py", "tests/test_train.py"
ATTRACTOR = f"{READING}::test_attractor_read_equals_one_query_at_a_time"
SHARED = "tests/test_distributed.py::test_on_processes"
UPDATE = "tests/test_posterior.py::test_update_equals_one_rank_one_step_per_pattern"

RUNTIME = [
    fault(
        "no-forward-mode-noticed",
        "forward-mode differentiation loses its tangents in silence",
        before=" or forward_ad._current_level >= 0",
        after="",
        tests=(f"{TRANSFORMS}::test_forward_mode_raises",),
    ),
    fault(
        "vmap-over-the-first-axis",
        "a mapped axis other than the first is taken to be the first",
        before="x.movedim(dim, 0)",
        after="x.movedim(0, 0)",
        tests=(f"{TRANSFORMS}::test_vmap_over_one_argument_and_any_axis",),
    ),
    fault(
        "noise-spread-over-memories-only",
        "one noise for all patterns is spread over memories but not over patterns",
        before='"noise_var": ("values", 2)',
        after='"noise_var": ("values", 1)',
        tests=("tests/test_gradients.py::test_noise_and_ridge_get_gradients_of_their_own_shape",),
    ),
    fault(
        "saved-input-for-output",
        "the backward of a write gets the new covariance in the place of the weights it found",
        before="WEIGHTS = 2  #",
        after="WEIGHTS = 1  #",
        tests=("tests/test_gradients.py::test_equals_the_reference",),
    ),
    fault(
        "bad-status-not-raised-plainly",
        "a plain call hands back what a failed factorisation left",
        before="failed = any(info.tolist())",
        after="failed = False",
        tests=(f"{CHECK}::test_covariance_that_is_none",),
    ),
    fault(
        "backend-without-gradient-taken",
        "a backend without a gradient is taken for a call that wants one",
        before="if not capability.gradients and wants_gradient(tensors):",
        after="if False:",
        tests=(BACKEND,),
    ),
    fault(
        "wrong-dtype-of-memory-taken",
        "a backend is taken for a dtype it does not compute in",
        before="dtype not in only[device]",
        after="device not in only",
        tests=(BACKEND,),
    ),
    fault(
        "two-dtypes-in-a-float64-call",
        "low precision codes are admitted beside a float64 memory",
        before="low_precision and first.dtype == torch.float32",
        after="low_precision",
        tests=("tests/test_precision.py::test_a_float64_memory_takes_no_low_precision",),
    ),
    fault(
        "true-is-a-count",
        "True counts as the number one",
        before="(isinstance(plain, (int, torch.SymInt)) and not isinstance(plain, bool))",
        after="isinstance(plain, (int, torch.SymInt))",
        tests=(f"{CHECK}::test_counts",),
    ),
    fault(
        "denormal-variance-admitted",
        "a variance that is zero in float32 passes the guard",
        before="if not limits.tiny <= value <= min(most, limits.max)",
        after="if not 0 < value <= limits.max",
        tests=(f"{CHECK}::test_variance_must_be_positive_and_finite_in_the_dtype_of_the_call",),
    ),
    fault(
        "infinite-variance-admitted",
        "only the smallest of several variances is checked",
        before="all(limits.tiny <= bound.item() <= most_held for bound in torch.aminmax(value))",
        after="limits.tiny <= value.min().item() < math.inf",
        tests=(f"{CHECK}::test_variance_must_be_positive_and_finite",),
    ),
    fault(
        "clean-changes-the-dtype",
        "a codec may hand back another dtype",
        before="if code.dtype != like.dtype:",
        after="if False:",
        tests=(f"{READING}::test_clean_must_return_codes_like_its_input",),
    ),
    fault(
        "mask-of-another-dtype",
        "a mask of integers passes the guard",
        before="not isinstance(value, Tensor) or value.dtype != torch.bool",
        after="not isinstance(value, Tensor)",
        tests=(f"{CHECK}::test_mask_of_the_wrong_shape_or_kind",),
    ),
    fault(
        "float16-not-widened",
        "under autocast float16 stays as it is",
        before="(torch.bfloat16, torch.float16)",
        within="LOW_PRECISION = (torch.bfloat16, torch.float16)",
        after="(torch.bfloat16,)",
        tests=(f"{TRANSFORMS}::test_autocast_takes_low_precision_and_computes_in_float32",),
    ),
    fault(
        "autocast-left-on",
        "the memory computes under autocast",
        before="torch.autocast(device, enabled=False)",
        after="torch.autocast(device, enabled=True)",
        tests=(f"{TRANSFORMS}::test_autocast_takes_low_precision_and_computes_in_float32",),
    ),
    fault(
        "codec-without-autocast",
        "a codec runs without the autocast that its caller asked for",
        before="torch.autocast(device)(lambda code: _widened(clean(code)))",
        after="lambda code: _widened(clean(code))",
        tests=(f"{TRANSFORMS}::test_a_codec_runs_under_autocast",),
    ),
    fault(
        "bad-status-of-a-checked-call-lost",
        "a call that is not plain hands back what a failed factorisation left",
        before="raise_failures(outputs[-1], operation, inputs)",
        after="pass",
        tests=(f"{CHECK}::test_covariance_that_is_none",),
    ),
    fault(
        "refused-call-computed-anyway",
        "an option that is a tensor is taken for what it is not",
        before="not inputs[0].is_cpu or num_options != operation.num_options",
        after="not inputs[0].is_cpu",
        tests=(f"{CHECK}::test_counts", CHECK),
    ),
    fault(
        "no-grad-not-asked",
        "a plain call records a gradient where none is recorded",
        before="wants_gradient and torch.is_grad_enabled()",
        after="wants_gradient",
        tests=("tests/test_gradients.py::test_nothing_is_entered_or_saved_where_no_gradient_is_wanted",),
    ),
]

REFERENCES = [
    fault(
        "reference-masked-values-read",
        "the reference reads the values of a masked pattern",
        before="values = values.masked_fill(~mask.unsqueeze(-1), 0)",
        after="pass",
        tests=("tests/test_posterior.py::test_what_a_masked_pattern_holds_is_never_read",),
    ),
    fault(
        "indefinite-slack-reference",
        "a thousandfold slack for indefinite covariances in the reference",
        before="4 * (rows + explained.shape[-1])",
        after="4000 * (rows + explained.shape[-1])",
        tests=(CHECK,),
    ),
    fault(
        "reference-squared-target",
        "the reference's squared-Gram solve starts from R z in place of G R z",
        before="target = address.gram @ target",
        after="pass",
        tests=("tests/test_addressing.py::test_weights_are_the_least_squares_solution",),
    ),
    fault(
        "gradient-of-another-solve",
        "the gradient of a squared-Gram solve is that of the ridge solve",
        before="ridge, 1, squared_gram, 0, None, grad",
        after="ridge, 1, False, 0, None, grad",
        tests=("tests/test_gradients.py::test_equals_the_reference",),
    ),
    fault(
        "reference-write-does-not-iterate",
        "each solve of a pattern is against the mean before the first",
        before="solve_addressing(candidate, z, ridge, squared_gram)",
        after="solve_addressing(mean, z, ridge, squared_gram)",
        tests=("tests/test_writing.py::test_write_with_every_option",),
    ),
    fault(
        "at-rest-goes-on",
        "a query whose values stay exactly the same goes on at a tolerance of zero",
        before="~(moved <= tol)",
        within="active = active & ~(moved <= tol)  # a NaN goes on",
        after="~(moved < tol)",
        tests=(READING,),
    ),
    fault(
        "energy-of-one-column",
        "the trace of U counts once in the energy and not once for each column",
        before="code_size * trace",
        after="trace",
        tests=(ATTRACTOR,),
    ),
    fault(
        "factor-shares-the-memory",
        "a factor keeps the caller's mean in place of a copy",
        before="copy = mean.clone(memory_format=torch.contiguous_format)",
        after="copy = mean",
        tests=("tests/test_factored.py::test_a_changed_memory_changes_no_factor",),
    ),
    fault(
        "settled-queries-are-overwritten",
        "a turn of the queries that go on stores what it computed for those that fill a memory up",
        before="_select(gather(active), turn(gather(code)), old)",
        after="turn(gather(code))",
        tests=(ATTRACTOR,),
    ),
    fault(
        "attractor-counts-stopped-queries",
        "a query that has stopped goes on being counted",
        before="taken = taken + active",
        within="taken = taken + active if i > 0:",
        after="taken = taken + 1",
        tests=(ATTRACTOR,),
    ),
    fault(
        "kl-weights-without-prior",
        "the norm of the weights is not divided by the prior's variance",
        before="weights.square().sum(-1) / prior_var + weights.shape[-1] * spread",
        after="weights.square().sum(-1) + weights.shape[-1] * spread",
        tests=(f"{MATRIX_NORMAL}::test_kl_weights_is_that_of_independent_normals",),
    ),
    fault(
        "kl-deepmind-variance-for-prior",
        "the released formula divides by the posterior's variance",
        before="/ prior_var).sum(-1)",
        within="(mean - prior_mean).square().sum(-1) / prior_var).sum(-1)",
        after="/ var).sum(-1)",
        tests=(f"{MATRIX_NORMAL}::test_kl_memory_deepmind_is_the_released_formula",),
    ),
]

DISTRIBUTIONS = [
    fault(
        "kronecker-rows-for-columns",
        "ln|V ⊗ U| takes the number of rows for that of columns",
        before="columns * log_det_of_factor(self.row_factor)",
        after="rows * log_det_of_factor(self.row_factor)",
        tests=(MATRIX_NORMAL,),
    ),
    fault(
        "kronecker-colour-not-transposed",
        "samples are coloured by the factor of V and not by its transpose",
        before="colored @ self.col_factor.mT",
        after="colored @ self.col_factor",
        tests=(MATRIX_NORMAL,),
    ),
    fault(
        "matrix-normal-kl-distance",
        "the distance of two means is measured by the wrong covariance",
        before="q.covariance.quadratic_form(p.loc - q.loc)",
        after="p.covariance.quadratic_form(p.loc - q.loc)",
        tests=(MATRIX_NORMAL,),
    ),
    fault(
        "matrix-normal-expand-forgets-to-validate",
        "an expanded distribution no longer checks its arguments",
        before="new._validate_args = self._validate_args",
        after="new._validate_args = False",
        tests=(MATRIX_NORMAL,),
    ),
    fault(
        "matrix-normal-entropy",
        "the entropy lacks the half of each entry",
        before="rows * columns * (1 + math.log(2 * math.pi))",
        after="rows * columns * math.log(2 * math.pi)",
        tests=(f"{MATRIX_NORMAL}::test_entropy_is_that_of_the_dense_gaussian",),
    ),
    fault(
        "variance-without-columns",
        "the variance of an entry leaves out its column's",
        before="variance = variance * self.covariance.col_cov.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)",
        after="pass",
        tests=(f"{MATRIX_NORMAL}::test_mean_mode_and_variance",),
    ),
]

MODULE = [
    fault(
        "saved-state-not-contiguous",
        "a state with gaps between its rows is saved as it is",
        before="tensor.detach().clone(memory_format=torch.contiguous_format)",
        after="tensor.detach()",
        tests=(STATE,),
    ),
    fault(
        "weight-variance-is-a-deviation",
        "σw² is read as σw",
        before="(2 * self.log_weight_stddev.squeeze(0)).exp()",
        after="self.log_weight_stddev.squeeze(0).exp()",
        tests=(MEMORY,),
    ),
    fault(
        "ridge-by-a-deviation",
        "λ is σ²/σ0 in place of σ²/σ0²",
        before="noise_var / self.w_prior_stddev**2",
        after="noise_var / self.w_prior_stddev",
        tests=(MEMORY,),
    ),
    fault(
        "prior-variance-squared",
        "the prior's covariance is the square of what its parameter says",
        before="self._prior_log_var().exp()",
        after="(2 * self._prior_log_var()).exp()",
        tests=(MEMORY,),
    ),
    fault(
        "sampled-weights-by-a-variance",
        "samples of the weights are scaled by σw²",
        before="weights + self.log_weight_stddev.exp() * torch.randn_like(weights)",
        after="weights + self.weight_var * torch.randn_like(weights)",
        tests=(MEMORY,),
    ),
    fault(
        "two-memories-in-one-read",
        "a read addresses a sample of the memory and decodes its mean",
        before="torch.randn_like(weights)) @ mean",
        after="torch.randn_like(weights)) @ state[0]",
        tests=(MEMORY,),
    ),
    fault(
        "attractor-arguments-swapped",
        "the module's attractor read exchanges the noise and the ridge",
        before="self.noise_var, self.ridge, clean=clean",
        after="self.ridge, self.noise_var, clean=clean",
        tests=(MEMORY,),
    ),
    fault(
        "module-drops-the-mask",
        "the module writes masked patterns",
        before="mask=mask",
        within="num_opt_iters=self.num_opt_iters, mask=mask, backend=self.backend",
        after="mask=None",
        tests=(MEMORY,),
    ),
    fault(
        "generate-one-iteration-too-many",
        "codes without a codec are read once more than asked",
        before="num_iters=num_iters - 1",
        within="read(memory, codes, self.ridge, num_iters=num_iters - 1",
        after="num_iters=num_iters",
        tests=(MEMORY,),
    ),
    fault(
        "kl-the-other-way-round",
        "the module's KL is that of the prior from the state",
        before="kl_memory(state, self.prior_state(state.mean.shape[0]), backend=self.backend)",
        after="kl_memory(self.prior_state(state.mean.shape[0]), state, backend=self.backend)",
        tests=(MEMORY,),
    ),
]

MODEL = [
    fault(
        "loss-kl-not-divided",
        "KL(M) is not divided by the number of reads",
        before="self.memory.kl(written.state) / num_reads",
        after="self.memory.kl(written.state)",
        tests=(MODELS,),
    ),
    fault(
        "loss-of-an-empty-episode",
        "an episode whose patterns are all masked has a loss that is no number",
        before="mask.sum(1).clamp_min(1)",
        after="mask.sum(1)",
        tests=(MODELS,),
    ),
    fault(
        "loss-counts-masked",
        "masked patterns count in the loss",
        before="kl_weights.masked_fill(~mask, 0)",
        after="kl_weights",
        tests=(f"{MODELS}::test_a_masked_pattern_is_as_if_it_were_not_there",),
    ),
    fault(
        "loss-without-samples",
        "the objective decodes the mean of q(w) in place of a sample",
        before="weights + self.memory.log_weight_stddev.exp() * noise",
        after="weights + 0 * self.memory.log_weight_stddev.exp() * noise",
        tests=(MODELS,),
    ),
    fault(
        "loss-reads-with-the-patterns",
        "weights are inferred from the patterns where there are cues",
        before="codes if cues is None or _are_same(cues, episode, mask) else self.encode(cues, mask)",
        after="codes",
        tests=(f"{MODELS}::test_cues_are_what_the_weights_are_inferred_from",),
    ),
    fault(
        "model-energy-may-rise",
        "a step that raises the energy is taken",
        before="active & ~(new_energy > energy)",
        after="active",
        tests=(f"{MODELS}::test_the_energy_never_rises",),
    ),
    fault(
        "model-rests-at-equal-energy",
        "a step that leaves the energy as it is is not taken",
        before="new_energy > energy",
        within="~(new_energy > energy)",
        after="new_energy >= energy",
        tests=(MODELS,),
    ),
    fault(
        "model-tie-is-no-number",
        "a pixel at a tie is passed on as NaN",
        before="torch.where(decoded.mode.isnan(), decoded.mean, decoded.mode)",
        after="decoded.mode",
        tests=(MODELS,),
    ),
    fault(
        "model-generate-one-iteration-too-many",
        "generated patterns are read once more than asked",
        before="num_iters - 1, state=state",
        after="num_iters, state=state",
        tests=(MODELS,),
    ),
]

TRAINING = [
    fault(
        "decoder-of-other-axes",
        "a decoder that leaves axes of the pattern in its batch is taken",
        before="if tuple(decoded.batch_shape) != (rows.shape[0],):",
        after="if False:",
        tests=(f"{MODELS}::test_a_decoder_of_other_axes_is_refused",),
    ),
    fault(
        "masked-patterns-have-samples",
        "samples of w are drawn for masked patterns too, so that those of the others depend on where they lie",
        before="torch.randn_like(_unmasked(weights, mask))",
        after="_unmasked(torch.randn_like(weights), mask)",
        tests=(f"{MODELS}::test_masked_patterns_are_as_if_the_episode_were_shorter",),
    ),
    fault(
        "images-cut-off-at-255",
        "a picture of 16 bits is cut off at 255",
        before='png.mode.startswith("I")',
        after="False",
        tests=(IMAGES,),
    ),
    fault(
        "images-without-a-ground",
        "what is transparent has the colour that lies under it",
        before='image.alpha_composite(behind, png.convert("RGBA")).convert("L")',
        after='png.convert("L")',
        tests=(IMAGES,),
    ),
    fault(
        "images-in-hidden-folders",
        "previews in hidden folders count as images",
        before="if not _is_hidden(name)]",
        after="]",
        tests=(IMAGES,),
    ),
    fault(
        "training-repeats-its-numbers",
        "every step of a training draws the same random numbers",
        before="1_000_003 * s.seed + self.step",
        after="1_000_003 * s.seed",
        tests=(TRAIN,),
    ),
    fault(
        "training-rate-never-falls",
        "the learning rate of the optimizer is never set",
        before='group["lr"] = self.learning_rate',
        after="pass",
        tests=(TRAIN,),
    ),
    fault(
        "training-resumes-without-moments",
        "a resumed training starts with an optimizer that remembers nothing",
        before="self.optimizer.state[parameter] = state",
        after="pass",
        tests=(f"{TRAIN}::test_interrupted_and_resumed_is_the_same_training",),
    ),
    fault(
        "training-resumes-at-the-first-step",
        "a resumed training forgets how many steps were taken",
        before='tensors["history"].tolist()',
        after="[]",
        tests=(f"{TRAIN}::test_interrupted_and_resumed_is_the_same_training",),
    ),
    fault(
        "training-stays-in-eval",
        "after the first read of cues the batch normalisation stays in its mode of evaluation",
        before="self.model.train()",
        after="pass",
        tests=(TRAIN,),
    ),
    fault(
        "training-without-clipping",
        "long gradients are not shortened",
        before="torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)",
        after="pass",
        tests=(TRAIN,),
    ),
    fault(
        "training-sees-what-is-held-out",
        "the training images hold those of the test",
        before="images[~test], binary(images[test])",
        after="images, binary(images[test])",
        tests=(f"{TRAIN}::test_whole_classes_are_held_out",),
    ),
    fault(
        "training-without-cues",
        "no cue is ever corrupted",
        before="self.cues(patterns, generator) if self.settings.corrupt else None",
        after="None",
        tests=(TRAIN,),
    ),
    fault(
        "checkpoint-of-other-images",
        "a checkpoint does not tell which images it was trained on",
        before="if data != fingerprint(self.data):",
        after="if False:",
        tests=(f"{TRAIN}::test_resume_refuses_other_images",),
    ),
    fault(
        "checkpoint-overwritten-in-place",
        "a save writes over the old checkpoint, so that a failure destroys it",
        before="yield partial",
        after="yield target",
        tests=(f"{TRAIN}::test_a_failed_save_leaves_the_old_checkpoint",),
    ),
]

ENGINE = [
    fault(
        "check-forgives-a-thousandfold",
        "the check of a kernel allows errors a thousand times as large",
        before="allowance.factor * (rounding[name]",
        after="1000 * allowance.factor * (rounding[name]",
        tests=("tests/test_cli.py::test_an_error_is_allowed_as_far_as_it_says",),
    ),
]

PROCESSES = [
    fault(
        "sum-over-ranks-not-summed-back",
        "the gradient of a sum over ranks is that of the rank's own loss",
        before="dist.all_reduce(total, group=ctx.group)",
        after="pass",
        tests=(SHARED,),
    ),
    fault(
        "kl-of-the-small-memory",
        "the KL of a sharded write counts the columns of the small memory",
        before="0.5 * columns * variance_divergence(",
        after="0.0 * columns * variance_divergence(",
        tests=(SHARED,),
    ),
    fault(
        "inner-products-never-summed-in-float64",
        "a sharded write of float32 keeps inner products that do not hold its system",
        before="if gram.dtype == torch.float64 or holds_digits(gram, pivots, ridge):",
        after="if True:",
        tests=(SHARED,),
    ),
    fault(
        "sharded-system-never-in-float64",
        "a sharded read of float32 solves with a system that float32 does not hold",
        before="if gram.dtype == torch.float32 and (info.any() or not holds_digits(gram, pivots, ridge)):",
        after="if False:",
        tests=(SHARED,),
    ),
    fault(
        "root-without-projection",
        "the gradient through a root without full rank counts what lies in its range twice",
        before="half + half.mT - half.mT @ (root @ inverse)",
        after="half + half.mT",
        tests=("tests/test_distributed.py::test_the_gradient_through_a_square_root",),
    ),
    fault(
        "pooled-without-noise",
        "patterns that are pooled over ranks all count alike, whatever their noise",
        before="(w / noise.double().unsqueeze(-1)).mT",
        after="w.mT",
        tests=(SHARED,),
    ),
    fault(
        "checksum-without-places",
        "ranks that hold the same numbers in another order are taken to agree",
        before="1 + x.numel() + (sums * places).sum()",
        after="1 + x.numel() + sums.sum()",
        tests=("tests/test_distributed.py::test_a_checksum_tells_values_and_places_apart",),
    ),
    fault(
        "columns-saved-from-the-first",
        "every rank saves its columns as if they were the first ones",
        before="sum(columns[:rank])",
        after="0",
        tests=(SHARED,),
    ),
]

PYTHON = [*RUNTIME, *REFERENCES, *DISTRIBUTIONS, *MODULE, *MODEL, *TRAINING, *ENGINE, *PROCESSES]
