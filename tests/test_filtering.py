"""filter_posterior: the steps, all past patterns at once, cuts anywhere, what decays do, and what is refused."""

import functools
import itertools

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import EMPTY_SHAPES, SHAPES, assert_close, assert_result, problem

import fastkm
from fastkm import MemoryState, filter_posterior, update_posterior
from fastkm._runtime import schema
from fastkm.filtering.reference import CHUNK, filter_sequential

FLOAT64 = torch.float64
NATIVE_MISSING = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
BACKENDS = ["reference", pytest.param("native", marks=NATIVE_MISSING)]
LAWS = ("none", "retention", "forgetting")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_law = pytest.mark.parametrize("law", LAWS)
every_read = pytest.mark.parametrize("read", ["after", "before"])
# B, T, Q, K, C: beside those of every family, T beside the sizes of chunks, and whole vectors, for one step too.
LONG_SHAPES = [(16, 31, 1, 6, 5), (16, 65, 1, 16, 16), (16, 200, 1, 7, 3), (16, 1, 1, 32, 16)]


def queries_of(p):
    """In the order of no pattern, and with the rows of the memory in the order that the weights have."""
    return torch.tanh(2 * p.weights.flip(1))


def decay_of(law, p):
    """Factors near 1, of every step its own."""
    factor = 1 / (1 + 0.05 * p.noise_var)
    return {} if law == "none" else {law: factor, "prior_var": p.ridge} if law == "retention" else {law: factor}


def run(p, backend, *, law="none", **options):
    arguments = {"mask": p.mask, **decay_of(law, p), **options}
    return filter_posterior(p.state, p.weights, p.values, queries_of(p), p.noise_var, **arguments, backend=backend)


def truth(p, form=oracle.filter_steps, *, law="none", **options):
    decay, one = decay_of(law, p), torch.ones_like(p.noise_var)
    mask = torch.ones_like(p.noise_var, dtype=torch.bool) if p.mask is None else p.mask
    factors = (decay.get("retention", one), decay.get("forgetting", one))
    inputs = (*p.state, p.weights, p.values, queries_of(p), p.noise_var, *factors, p.ridge, mask)
    return oracle.batched(form, *inputs, **options)


def part_of(p, first, last):
    """Steps [first, last) of the problem; queries and decay go with their steps."""
    cut = {name: getattr(p, name)[:, first:last] for name in ("weights", "values", "noise_var")}
    return p._replace(**cut, mask=None if p.mask is None else p.mask[:, first:last])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES + LONG_SHAPES, ids=str)
@every_read
@every_law
@every_backend
def test_filter_equals_the_steps(shape, masked, law, read, backend, dtype):
    p = problem(*shape, dtype, masked=masked)
    expected = truth(p, law=law, before=read == "before")
    # Rounding grows with what a chunk forgets: by 1.5 in a kernel's, by 1.2 in the reference's, which is shorter.
    times = dict.fromkeys(expected, 4) if law == "forgetting" else {}
    oracle.judge(functools.partial(run, law=law, read=read), p, expected, backend, times=times)


@pytest.mark.parametrize("shape", [(2, 9, 1, 5, 7), (2, 20, 1, 6, 3), (1, 40, 1, 33, 12)], ids=str)
@every_law
@every_backend
def test_every_read_is_one_regression_on_its_past(shape, law, backend):
    p = problem(*shape, masked=True)
    assert_result(run(p, backend, law=law), truth(p, oracle.filter_at_once, law=law))


@given(
    sizes=st.tuples(*[st.integers(0, n) for n in (3, 40, 20, 20)]),
    law=st.sampled_from(LAWS),
    masked=st.booleans(),
    layout=st.sampled_from(oracle.LAYOUTS),
    seed=st.integers(0, 99),
)
@every_backend
def test_filter_of_any_shape_and_layout(sizes, law, masked, layout, seed, backend):
    B, T, K, C = sizes
    p = problem(B, T, 0, K, C, seed=seed, masked=masked)
    if B:
        assert_result(
            run(oracle.map_tensors(p, lambda x: oracle.poisoned(x, layout)), backend, law=law), truth(p, law=law)
        )
    else:
        assert run(p, backend, law=law).values.shape == (0, T, C)


@pytest.mark.parametrize("sizes", [(9, 6), (16, 32)], ids=["in part", "whole vectors"])
@every_read
@every_law
@every_backend
def test_a_sequence_may_be_cut_anywhere(law, read, sizes, backend, dtype):
    """T = 1 is the step of decoding: a state that went through files and calls goes on as if nothing had been cut."""
    T = 2 * CHUNK + 5
    p = problem(2, T, 0, *sizes, dtype, masked=True)
    queries, decay = queries_of(p), decay_of(law, p)
    whole = run(p, backend, law=law, read=read)
    for cuts in ([0, 1, T], [0, CHUNK - 1, CHUNK + 2, T], [0, T, T], list(range(T + 1))):
        state, made = p.state, []
        for first, last in itertools.pairwise(cuts):
            factor = {name: x if name == "prior_var" else x[:, first:last] for name, x in decay.items()}
            part = part_of(p, first, last)
            inputs = (part.weights, part.values, queries[:, first:last], part.noise_var)
            made.append(filter_posterior(state, *inputs, **factor, mask=part.mask, read=read, backend=backend))
            state = made[-1].state
        assert_close(state.mean, whole.state.mean.double(), "mean")
        assert_close(state.cov, whole.state.cov.double(), "cov")
        for name in ("values", "variance", "innovation_var"):
            assert_close(torch.cat([getattr(x, name) for x in made], 1), getattr(whole, name).double(), name)
        assert_close(sum(x.log_evidence for x in made), whole.log_evidence.double(), "log_evidence")


@every_backend
def test_without_decay_it_ends_where_an_update_ends(backend, dtype):
    p = problem(3, 70, 0, 9, 6, dtype, masked=True)
    filtered = run(p, backend)
    updated = update_posterior(p.state, p.weights, p.values, p.noise_var, mask=p.mask, backend=backend)
    for name in ("mean", "cov"):
        assert_close(getattr(filtered.state, name), getattr(updated.state, name).double(), name)
    assert_close(filtered.innovation_var, updated.innovation_var.double(), "innovation_var")
    assert_close(filtered.log_evidence, updated.log_evidence.double(), "log_evidence")


@every_backend
def test_it_is_the_layer_of_mesanet(backend):
    """o_t = H_t^{-1} of the ridge regression on the past: (Σ β k kᵀ + diag λ)⁻¹, applied to Σ β k vᵀ and q_t."""
    p = problem(2, 12, 0, 6, 4)
    penalty, beta = 0.5 + torch.rand(6, dtype=FLOAT64), 1 / p.noise_var
    state = MemoryState(torch.zeros_like(p.state.mean), torch.diag(1 / penalty).repeat(2, 1, 1))
    made = filter_posterior(state, p.weights, p.values, queries_of(p), p.noise_var, backend=backend)
    weighted = beta[:, :, None, None] * p.weights.unsqueeze(-1)
    gram = (weighted * p.weights.unsqueeze(-2)).cumsum(1) + torch.diag(penalty)
    crossed = (weighted * p.values.unsqueeze(-2)).cumsum(1)
    solved = torch.cholesky_solve(queries_of(p).unsqueeze(-1), torch.linalg.cholesky(gram))
    assert_close(made.values, (solved.mT @ crossed).squeeze(-2), "values")
    assert_close(made.variance, (solved.squeeze(-1) * queries_of(p)).sum(-1), "variance")


@every_backend
def test_a_read_before_is_a_prediction(backend):
    """With q_t = w_t it is the forecast of z_t, and s_t = v_t + σ²; the log evidence is the likelihood of the z_t."""
    p = problem(2, 40, 0, 6, 4)
    made = filter_posterior(p.state, p.weights, p.values, p.weights, p.noise_var, read="before", backend=backend)
    assert_close(made.innovation_var, made.variance + p.noise_var, "innovation_var")
    law = torch.distributions.Normal(made.values, made.innovation_var.sqrt().unsqueeze(-1))
    assert_close(made.log_evidence, law.log_prob(p.values).sum((1, 2)), "log_evidence")


# ---- masks ---------------------------------------------------------------------------------------------------------


@every_read
@every_law
@every_backend
def test_a_masked_step_is_absent_but_for_its_query(law, read, backend, dtype):
    p = problem(3, 11, 0, 6, 5, dtype)
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    queries, decay = queries_of(p), decay_of(law, p)
    masked = run(p, backend, law=law, read=read, mask=keep.expand(3, 11))
    kept = {name: x if name == "prior_var" else x[:, keep] for name, x in decay.items()}
    inputs = (p.weights[:, keep], p.values[:, keep], queries[:, keep], p.noise_var[:, keep])
    absent = filter_posterior(p.state, *inputs, **kept, read=read, backend=backend)
    assert_close(masked.state.mean, absent.state.mean.double(), "mean")
    assert_close(masked.state.cov, absent.state.cov.double(), "cov")
    assert_close(masked.log_evidence, absent.log_evidence.double(), "log_evidence")
    for name in ("values", "variance", "innovation_var"):
        assert_close(getattr(masked, name)[:, keep], getattr(absent, name).double(), name)
    eps = torch.finfo(dtype).eps
    assert oracle.error(masked.innovation_var[:, ~keep], p.noise_var[:, ~keep]) <= 2 * eps * p.noise_var.max()


@every_law
@every_backend
def test_what_a_masked_step_writes_is_never_read(law, backend, dtype):
    p = problem(3, 41, 0, 6, 5, dtype, masked=True)
    hidden = ~p.mask.unsqueeze(-1)
    queries, decay = queries_of(p), decay_of(law, p)

    def made(*patterns):
        return filter_posterior(p.state, *patterns, queries, p.noise_var, **decay, mask=p.mask, backend=backend)

    nan = made(*(x.masked_fill(hidden, torch.nan) for x in (p.weights, p.values)))
    assert oracle.equal(nan, made(p.weights, p.values))
    assert all(x.isfinite().all() for x in oracle.flat(nan).values())


@every_backend
def test_ragged_sequences_in_one_batch_are_each_alone(backend, dtype):
    p = problem(3, 50, 0, 6, 5, dtype)
    lengths = torch.tensor([50, 33, 7])
    mask = torch.arange(50) < lengths.unsqueeze(-1)
    together = run(p, backend, law="retention", mask=mask)
    queries, decay = queries_of(p), decay_of("retention", p)
    for b, length in enumerate(lengths):
        rows = (x[b : b + 1, :length] for x in (p.weights, p.values, queries, p.noise_var))
        state = MemoryState(*(x[b : b + 1] for x in p.state))
        decays = {"retention": decay["retention"][b : b + 1, :length], "prior_var": p.ridge[b : b + 1]}
        alone = filter_posterior(state, *rows, **decays, backend=backend)
        assert_close(together.values[b, :length], alone.values[0].double(), "values")
        assert_close(together.state.cov[b], alone.state.cov[0].double(), "cov")


# ---- arguments in their forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float", "0-d", "B", "BT"])
@pytest.mark.parametrize("name", ["noise_var", "retention", "forgetting"])
@every_backend
def test_numbers_may_be_given_in_four_forms(name, form, backend, dtype):
    p = problem(3, 5, 0, 6, 4, dtype)
    full = torch.full((3, 5), 0.75, dtype=dtype)
    given_as = {"float": 0.75, "0-d": full[0, 0], "B": full[:, 0], "BT": full}
    inputs = {"noise_var": p.noise_var}

    def made(value):
        return filter_posterior(p.state, p.weights, p.values, queries_of(p), **inputs | {name: value}, backend=backend)

    assert oracle.equal(made(given_as[form]), made(full))


@pytest.mark.parametrize("form", ["float", "0-d", "B"])
@every_backend
def test_a_prior_may_be_given_in_three_forms(form, backend, dtype):
    p = problem(3, 5, 0, 6, 4, dtype)
    full = torch.full((3,), 0.75, dtype=dtype)
    value = {"float": 0.75, "0-d": full[0], "B": full}[form]
    assert oracle.equal(run(p, backend, retention=0.5, prior_var=value), run(p, backend, retention=0.5, prior_var=full))


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@every_law
@every_backend
def test_empty_axes(shape, law, backend, dtype):
    B, T, _, K, C = shape
    p = problem(*shape, dtype)
    result = run(p, backend, law=law)
    got = {name: tuple(x.shape) for name, x in oracle.flat(result).items()}
    assert got == {
        "mean": (B, K, C),
        "cov": (B, K, K),
        "values": (B, T, C),
        "variance": (B, T),
        "innovation_var": (B, T),
        "log_evidence": (B,),
    }
    if B and T:
        assert_result(result, truth(p, law=law))
    if not T:
        assert oracle.equal(result.state, p.state)


# ---- what decay does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["retention", "forgetting"])
@every_backend
def test_a_factor_of_one_is_no_decay(law, backend, dtype):
    p = problem(2, 40, 0, 6, 5, dtype)
    plain = oracle.flat(run(p, backend))
    for name, x in oracle.flat(run(p, backend, **{law: 1.0})).items():
        assert_close(x, plain[name].double(), name)


@pytest.mark.parametrize("kept", [1e-30, 1e-3, 0.5, 0.999])
@every_backend
def test_retention_never_knows_less_than_the_prior(kept, backend, dtype):
    p = problem(2, 70, 0, 6, 5, dtype)
    start = MemoryState(p.state.mean, 0.3 * torch.eye(6, dtype=dtype).repeat(2, 1, 1))
    made = run(p._replace(state=start), backend, retention=kept, prior_var=0.7)
    slack = 1 + oracle.ROUNDINGS * torch.finfo(dtype).eps
    assert (made.variance <= 0.7 * slack * queries_of(p).square().sum(-1)).all()
    assert (torch.linalg.eigvalsh(made.state.cov) <= 0.7 * slack).all()
    assert (torch.linalg.eigvalsh(made.state.cov) > 0).all()


@every_backend
def test_a_memory_that_keeps_nothing_reads_the_last_pattern_alone(backend, dtype):
    p = problem(2, 40, 0, 6, 5, dtype)
    made = run(p, backend, retention=torch.finfo(dtype).tiny, prior_var=0.7)
    gain = (p.weights * queries_of(p)).sum(-1) / (p.weights.square().sum(-1) + p.noise_var / 0.7)
    assert_close(made.values, (gain.unsqueeze(-1) * p.values).double(), "values")


@pytest.mark.parametrize("factor", [0.3, 0.7, 0.97])
@every_backend
def test_forgetting_weighs_patterns_by_their_age(factor, backend):
    """The memory is the regression with the weights γ^(T−t), whatever γ is."""
    p = problem(2, 30, 0, 3, 5)
    made = run(p, backend, forgetting=factor)
    age = factor ** torch.arange(29, -1, -1, dtype=FLOAT64)
    weighted = p.weights.mT * (age / p.noise_var).unsqueeze(1)
    first = torch.cholesky_inverse(torch.linalg.cholesky(p.state.cov)) * factor**30
    precision = first + weighted @ p.weights
    cov = torch.cholesky_inverse(torch.linalg.cholesky(precision))
    # A covariance has what the condition of its precision leaves of 16 digits.
    scale = (torch.linalg.cond(precision) * cov.abs().amax((1, 2))).max().item()
    assert oracle.error(made.state.cov, cov) <= 32 * torch.finfo(FLOAT64).eps * scale


@every_backend
def test_no_variance_is_negative(backend):
    """One pattern again and again leaves a variance that rounding could turn over."""
    p = problem(4, 100, 0, 5, 3, torch.float32)
    weights = p.weights[:, :1].expand(-1, 100, -1)
    made = filter_posterior(p.state, weights, p.values, weights, 1e-3, backend=backend)
    assert (made.variance >= 0).all()
    assert (made.innovation_var >= 1e-3).all()


# ---- gradients of the reference ------------------------------------------------------------------------------------


@every_read
@every_law
def test_the_reference_has_the_gradient_of_the_steps(law, read):
    """By every tensor. ``retention`` of exactly 1 is among them, where ratios of kept parts have a corner in |x|."""
    p = problem(2, CHUNK + 7, 0, 5, 4)
    factor = decay_of(law, p).get(law)
    if factor is not None:
        factor = torch.where(torch.arange(CHUNK + 7) % 5 == 2, 1.0, factor)
    named = {"mean": p.state.mean, "cov": p.state.cov, "weights": p.weights, "values": p.values}
    named |= {"queries": queries_of(p), "noise_var": p.noise_var, "prior_var": p.ridge}
    named |= {} if factor is None else {law: factor}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in named.items()}
    prior = (leaves["mean"], (leaves["cov"] + leaves["cov"].mT) / 2)
    inputs = [leaves[name] for name in ("weights", "values", "queries", "noise_var")]
    decay = {name: leaves.get(name) for name in ("retention", "forgetting", "prior_var")}
    made = filter_posterior(MemoryState(*prior), *inputs, **decay, read=read, backend="reference")
    expected = filter_sequential(*prior, *inputs, **decay, read_before=read == "before")
    cotangents = [torch.randn_like(x) for x in expected]
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    outputs = list(oracle.flat(made).values())
    got = torch.autograd.grad(outputs, list(leaves.values()), cotangents, **options)
    wanted = torch.autograd.grad(expected, list(leaves.values()), cotangents, **options)
    for name, x, y in zip(leaves, got, wanted, strict=True):
        assert oracle.error(x, y) <= 1e-11 * oracle.largest(y), name


# ---- gradients of the kernels --------------------------------------------------------------------------------------


def gradients(p, backend, *, law, read="after", outputs=None, **changed):
    """By every tensor, of the outputs named ``outputs``; ``cov`` made symmetric, as only that is defined."""
    named = {"mean": p.state.mean, "cov": p.state.cov, "weights": p.weights, "values": p.values}
    named |= {"queries": queries_of(p), "noise_var": p.noise_var, **decay_of(law, p), **changed}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in named.items()}
    decay = {name: leaves.get(name) for name in ("retention", "forgetting")}
    decay |= {"prior_var": leaves["prior_var"]} if "prior_var" in leaves else {}
    inputs = [leaves[name] for name in ("weights", "values", "queries", "noise_var")]
    state = MemoryState(leaves["mean"], leaves["cov"])
    made = oracle.flat(filter_posterior(state, *inputs, **decay, mask=p.mask, read=read, backend=backend))
    used = [x for name, x in made.items() if outputs is None or name in outputs]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=FLOAT64).to(x.dtype) for x in used]
    found = torch.autograd.grad(used, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
    found = dict(zip(leaves, found, strict=True))
    found["cov"] = found["cov"] + found["cov"].mT
    return found


def assert_same(found, expected, tolerance=1e-10):
    for name, truth in expected.items():
        wrong = oracle.error(found[name], truth)
        assert wrong <= tolerance * oracle.largest(truth), f"{name}: error {wrong:.3g} of {oracle.largest(truth):.3g}"


OUTPUTS = ("mean", "cov", "values", "variance", "innovation_var", "log_evidence")


@NATIVE_MISSING
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 9, 1, 4, 7), (2, 33, 1, 31, 20), (2, 70, 1, 17, 9)], ids=str)
@every_read
@every_law
def test_the_kernel_has_the_gradient_of_the_reference(law, read, shape, masked):
    p = problem(*shape, masked=masked)
    expected = gradients(p, "reference", law=law, read=read)
    assert_same(gradients(p, "native", law=law, read=read), expected)


@NATIVE_MISSING
@pytest.mark.parametrize("output", OUTPUTS)
@every_law
def test_the_gradient_of_each_output_alone(law, output):
    p = problem(2, 37, 1, 6, 5, masked=True)
    expected = gradients(p, "reference", law=law, outputs=[output])
    found = gradients(p, "native", law=law, outputs=[output])
    largest = max(map(oracle.largest, expected.values()))
    for name, truth in expected.items():  # the variances do not depend on the values: their gradient is zero
        assert oracle.error(found[name], truth) <= 1e-10 * max(oracle.largest(truth), 1e-6 * largest), name


@NATIVE_MISSING
@every_read
@every_law
def test_finite_differences(law, read):
    p = problem(2, 3, 1, 3, 2)
    decay = decay_of(law, p)
    inputs = (p.state.mean, p.state.cov, p.weights, p.values, queries_of(p), p.noise_var, *decay.values())
    leaves = [x.clone().requires_grad_() for x in inputs]

    def outputs(mean, root, *rest):
        cov = root @ root.mT + torch.eye(3, dtype=FLOAT64)
        factors = dict(zip(decay, rest[4:], strict=True))
        made = filter_posterior(MemoryState(mean, cov), *rest[:4], **factors, read=read, backend="native")
        return tuple(oracle.flat(made).values())

    assert torch.autograd.gradcheck(outputs, leaves)


@NATIVE_MISSING
@every_law
def test_gradients_go_through_a_cut(law):
    """Filtering 70 steps is filtering 33 and then 37, and so are the gradients."""
    p = problem(2, 70, 1, 5, 6)
    found = []
    for cuts in ([0, 70], [0, 33, 70]):
        decay = decay_of(law, p)
        leaves = [x.clone().requires_grad_() for x in (*p.state, p.weights, p.values, p.noise_var, *decay.values())]
        state, total = MemoryState(*leaves[:2]), 0
        for first, last in itertools.pairwise(cuts):
            now = slice(first, last)
            factors = {n: x if n == "prior_var" else x[:, now] for n, x in zip(decay, leaves[5:], strict=True)}
            rows = (leaves[2][:, now], leaves[3][:, now], leaves[2][:, now], leaves[4][:, now])
            made = filter_posterior(state, *rows, **factors, read="before", backend="native")
            state = made.state
            total = total + made.values.square().sum() + made.variance.sum() - made.log_evidence.sum()
        (total + state.mean.square().sum() + state.cov.square().sum()).backward()
        found.append({str(i): x.grad + x.grad.mT if i == 1 else x.grad for i, x in enumerate(leaves)})
    assert_same(*found)


@NATIVE_MISSING
@every_law
def test_what_a_masked_step_writes_gets_no_gradient(law):
    p = problem(3, 41, 1, 5, 4, masked=True)
    off = ~p.mask.unsqueeze(-1)
    queries = queries_of(p)
    dirty = p._replace(values=p.values.masked_fill(off, torch.nan), weights=p.weights.masked_fill(off, torch.nan))
    clean, found = (gradients(x, "native", law=law, queries=queries) for x in (p, dirty))
    for name in ("weights", "values"):
        assert (found[name].masked_select(off) == 0).all()
    for name, expected in clean.items():
        assert torch.equal(found[name], expected), name


@NATIVE_MISSING
@pytest.mark.parametrize("threads", [1, 2, 3])
@every_law
def test_the_same_bits_in_any_batch_with_any_threads(law, threads, dtype):
    """Some memories are smaller than a shared product, and one is larger."""
    for shape in ((5, 37, 1, 9, 6), (2, 40, 1, 160, 130)):
        p = problem(*shape, dtype, masked=True)
        torch.set_num_threads(1)
        once, slopes = run(p, "native", law=law), gradients(p, "native", law=law)
        torch.set_num_threads(threads)
        assert oracle.equal(run(p, "native", law=law), once)
        again = gradients(p, "native", law=law)
        assert all(torch.equal(again[name], x) for name, x in slopes.items())
        alone = oracle.map_tensors(p, lambda x: x[1:2])
        decay = {name: x[1:2] for name, x in decay_of(law, p).items()}
        for name, x in oracle.flat(run(alone, "native", **decay)).items():
            assert torch.equal(x[0], oracle.flat(once)[name][1]), name


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["retention", "forgetting"])
@every_backend
def test_a_factor_outside_its_range_is_refused_in_words(name, value, backend):
    p = problem(2, 3, 0, 4, 5, torch.float32)
    tensor = torch.tensor([[1.0, 0.5, 0.5], [0.5, value, 1.0]])
    for given_as in (value, torch.tensor(value), tensor):
        with pytest.raises(ValueError, match=rf"^{name} must be positive and at most 1"):
            run(p, backend, **{name: given_as})


@every_backend
def test_two_laws_are_refused(backend):
    p = problem(2, 3, 0, 4, 5)
    with pytest.raises(ValueError, match="retention and forgetting are two laws of decay"):
        run(p, backend, retention=0.5, forgetting=0.5)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("weights", (2, 3, 5), r"weights must have shape \[B, T, K\] = \[2, 3, 4\], got \[2, 3, 5\]"),
        ("values", (2, 3, 6), r"values must have shape \[B, T, C\] = \[2, 3, 5\], got \[2, 3, 6\]"),
        ("queries", (2, 4, 4), r"queries must have shape \[B, T, K\] = \[2, 3, 4\], got \[2, 4, 4\]"),
        ("noise_var", (3,), r"noise_var must be a float or a tensor of shape 0-d, .*got \[3\]"),
        ("retention", (2, 4), r"retention must be a float or a tensor of shape 0-d, .*got \[2, 4\]"),
        ("forgetting", (3, 3), r"forgetting must be a float or a tensor of shape 0-d, .*got \[3, 3\]"),
        ("prior_var", (2, 3), r"prior_var must be a float or a tensor of shape 0-d, .*got \[2, 3\]"),
        ("mask", (2, 2), r"mask must have shape \[B, T\] = \[2, 3\], got \[2, 2\]"),
    ],
)
@every_backend
def test_a_wrong_shape_is_refused_in_words(name, shape, words, backend):
    p = problem(2, 3, 0, 4, 5)
    inputs = {"state": p.state, "weights": p.weights, "values": p.values, "queries": queries_of(p), "noise_var": 1.0}
    wrong = torch.ones(shape, dtype=torch.bool if name == "mask" else FLOAT64)
    with pytest.raises(ValueError, match=words):
        filter_posterior(**inputs | {name: wrong}, backend=backend)


@pytest.mark.parametrize("name", ["weights", "values", "queries", "noise_var", "retention", "forgetting", "prior_var"])
@every_backend
def test_a_wrong_dtype_is_refused_in_words(name, backend):
    p = problem(2, 3, 0, 4, 5)
    given_all = {"weights": p.weights, "values": p.values, "queries": queries_of(p), "noise_var": p.noise_var}
    wrong = given_all.get(name, torch.full((2,), 0.5)).float()
    with pytest.raises(TypeError, match=f"^{name} must be float64 like state.mean, got float32"):
        filter_posterior(p.state, **given_all | {name: wrong}, backend=backend)


@every_backend
def test_a_read_is_after_or_before(backend):
    with pytest.raises(ValueError, match="read must be one of 'after', 'before', got 'during'"):
        run(problem(2, 3, 0, 4, 5), backend, read="during")


@every_backend
def test_forgetting_that_leaves_the_range_is_refused_in_words(backend):
    """Where no weights reach, U grows by 1/γ a step: 0.9 over 1,000 steps is 1e45, beyond float32."""
    p = problem(2, 1000, 0, 4, 5, torch.float32)
    weights = p.weights.clone()
    weights[1, :, 0] = 0  # only the second memory has a row that nothing reaches
    state = MemoryState(p.state.mean, torch.eye(4).repeat(2, 1, 1))
    with pytest.raises(torch.linalg.LinAlgError, match=r"new covariance is beyond the range.*memory \[1\].*forgetting"):
        filter_posterior(state, weights, p.values, weights, p.noise_var, forgetting=0.9, backend=backend)


@pytest.mark.parametrize("sick", ["asymmetric", "indefinite", "nan"])
@every_backend
def test_a_bad_covariance_is_refused_in_words(sick, backend, dtype):
    p = problem(3, 40, 0, 4, 5, dtype)
    cov = p.state.cov.clone()
    if sick == "asymmetric":
        cov[1, 0, 2] += 1
    else:
        cov[1, 2, 2] = -3 if sick == "indefinite" else torch.nan
    words = {"asymmetric": "not symmetric", "indefinite": "not positive definite", "nan": "not finite"}[sick]
    with pytest.raises(torch.linalg.LinAlgError, match=rf"state.cov is {words} in memory \[1\]"):
        run(p._replace(state=MemoryState(p.state.mean, cov)), backend)


@every_backend
def test_too_little_noise_is_refused_in_words(backend, dtype):
    p = problem(2, 40, 0, 4, 5, dtype)
    weights = torch.zeros_like(p.weights)
    weights[..., 0] = 1
    with pytest.raises(torch.linalg.LinAlgError, match="new covariance is lost to rounding"):
        filter_posterior(p.state, weights, p.values, weights, torch.finfo(dtype).eps / 4, backend=backend)


def test_the_default_backend_is_the_first_that_can_run():
    p = problem(2, 3, 0, 4, 5)
    chosen = "reference" if schema.unavailable is not None else "native"
    assert oracle.equal(run(p, None), run(p, chosen))
    assert fastkm.filter_posterior is filter_posterior
