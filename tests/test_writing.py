"""write: the literal loop, the Gram-space form, and what an episode must satisfy."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import EMPTY_SHAPES, SHAPES, assert_close, assert_result, batched, problem

from fastkm import kl_memory, solve_addressing, update_posterior, write
from fastkm._runtime import schema
from fastkm.writing.reference import write_gram_space


def run(p, backend, **options):
    changes = {name: options.pop(name) for name in list(options) if name in p._fields}
    p = p._replace(**changes)
    return write(p.state, p.values, p.noise_var, p.ridge, mask=p.mask, backend=backend, **options)


def truth(p, num_opt_iters=1, method="ridge"):
    mask = torch.ones(p.values.shape[:2], dtype=torch.bool) if p.mask is None else p.mask
    arguments = (*p.state, p.values, p.noise_var, p.ridge, mask)
    return batched(oracle.write, *arguments, num_opt_iters=num_opt_iters, squared=method == "deepmind")


def judge(p, backend, **options):
    oracle.judge(lambda p, b: run(p, b, **options), p, truth(p, **options), backend)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_write_equals_the_literal_loop(shape, masked, backend, dtype):
    judge(problem(*shape, dtype, masked=masked), backend)


@pytest.mark.parametrize("num_opt_iters", [1, 2, 3])
@pytest.mark.parametrize("method", ["ridge", "deepmind"])
@pytest.mark.parametrize("shape", [(16, 9, 1, 4, 7), (16, 5, 1, 13, 6), (16, 18, 1, 9, 16)], ids=str)
def test_write_with_every_option(shape, method, num_opt_iters, backend, dtype):
    judge(problem(*shape, dtype, masked=True), backend, num_opt_iters=num_opt_iters, method=method)


@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 12, 18, 18)]),
    masked=st.booleans(),
    layout=st.sampled_from(oracle.LAYOUTS),
    num_opt_iters=st.integers(1, 2),
    method=st.sampled_from(["ridge", "deepmind"]),
    seed=st.integers(0, 99),
)
def test_write_of_any_shape_and_layout(sizes, masked, layout, num_opt_iters, method, seed, backend):
    B, T, K, C = sizes
    p = problem(B, T, 0, K, C, seed=seed, masked=masked)
    hostile = oracle.map_tensors(p, lambda x: oracle.poisoned(x, layout))
    options = {"num_opt_iters": num_opt_iters, "method": method}
    assert_result(run(hostile, backend, **options), truth(p, **options))


@pytest.mark.parametrize("shape", [(2, 9, 1, 4, 7), (2, 12, 1, 13, 6), (1, 40, 1, 9, 16)], ids=str)
def test_gram_space_form_equals_the_literal_loop(shape, backend):
    p = problem(*shape)
    fields = ("mean", "cov", "weights", "innovation_var", "kl")
    gram_space = dict(zip(fields, write_gram_space(*p.state, p.values, p.noise_var, p.ridge), strict=True))
    assert_result(run(p, backend), gram_space)


def test_written_weights_explain_the_written_memory(backend):
    """Given the weights that were used, the write is one posterior update."""
    p = problem(2, 15, 1, 7, 6, masked=True)
    written = run(p, backend)
    updated = update_posterior(p.state, written.weights, p.values, p.noise_var, mask=p.mask, backend=backend)
    assert_result(written, {name: x for name, x in oracle.flat(updated).items() if name != "log_evidence"})


def test_each_pattern_is_addressed_in_the_memory_before_it(backend):
    p = problem(2, 6, 1, 7, 5)
    whole, state = run(p, backend), p.state
    for t in range(6):
        z = p.values[:, t : t + 1]
        weights = solve_addressing(state.mean, z, p.ridge, backend=backend)
        assert_close(whole.weights[:, t : t + 1], weights, f"weights of pattern {t}")
        state = update_posterior(state, weights, z, p.noise_var[:, t : t + 1], backend=backend).state
    assert_close(whole.state.mean, state.mean, "mean")


def test_two_segments_are_the_whole(backend, dtype):
    p = problem(3, 20, 1, 9, 6, dtype)
    whole = run(p, backend)
    for cut in (0, 1, 11, 20):
        first = run(p, backend, values=p.values[:, :cut], noise_var=p.noise_var[:, :cut])
        rest = run(p, backend, state=first.state, values=p.values[:, cut:], noise_var=p.noise_var[:, cut:])
        assert_close(rest.state.mean, whole.state.mean, "mean")
        assert_close(rest.state.cov, whole.state.cov, "cov")
        assert_close(torch.cat([first.weights, rest.weights], 1), whole.weights, "weights")
        assert_close(torch.cat([first.kl, rest.kl], 1), whole.kl, "kl")


def test_order_of_patterns_matters(backend):
    """Unlike the update, whose weights are given."""
    p = problem(2, 8, 1, 7, 5)
    backwards = run(p, backend, values=p.values.flip(1), noise_var=p.noise_var.flip(1))
    assert oracle.error(backwards.state.mean, run(p, backend).state.mean) > 1e-3


def test_covariance_shrinks_and_stays_symmetric_positive_definite(backend, dtype):
    p = problem(4, 60, 1, 13, 9, dtype)
    result = run(p, backend)
    cov, prior = result.state.cov.double(), p.state.cov.double()
    rounding = oracle.ROUNDINGS * torch.finfo(dtype).eps * prior.abs().max()
    assert_close(result.state.cov, result.state.cov.mT.double(), "symmetry")
    assert torch.linalg.eigvalsh((cov + cov.mT) / 2).min() > 0
    assert torch.linalg.eigvalsh(prior - (cov + cov.mT) / 2).min() > -rounding
    assert (result.innovation_var >= p.noise_var).all()


def test_masked_pattern_is_an_absent_pattern(backend, dtype):
    p = problem(3, 11, 1, 6, 5, dtype)
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    masked = run(p, backend, mask=keep.expand(3, 11))
    absent = run(p, backend, values=p.values[:, keep], noise_var=p.noise_var[:, keep])
    assert_close(masked.state.mean, absent.state.mean, "mean")
    assert_close(masked.state.cov, absent.state.cov, "cov")
    assert_close(masked.weights[:, keep], absent.weights, "weights")
    assert_close(masked.kl[:, keep], absent.kl, "kl")
    assert_close(masked.innovation_var[:, keep], absent.innovation_var, "innovation_var")
    eps = torch.finfo(dtype).eps
    assert oracle.error(masked.innovation_var[:, ~keep], p.noise_var[:, ~keep]) <= 2 * eps * p.noise_var.max()
    assert oracle.largest(masked.kl[:, ~keep]) <= 2 * eps * p.values.shape[-1]
    assert (masked.weights[:, ~keep] == 0).all()


@pytest.mark.parametrize("method", ["ridge", "deepmind"])
@pytest.mark.parametrize("num_opt_iters", [1, 2])
def test_what_a_masked_pattern_holds_is_never_read(num_opt_iters, method, backend, dtype):
    p = problem(3, 11, 1, 6, 5, dtype, masked=True)
    options = {"num_opt_iters": num_opt_iters, "method": method}
    nan = run(p, backend, values=p.values.masked_fill(~p.mask.unsqueeze(-1), math.nan), **options)
    assert all(x.isfinite().all() for x in oracle.flat(nan).values())
    assert oracle.equal(nan, run(p, backend, **options))


def test_nothing_written_is_nothing_changed(backend, dtype):
    p = problem(3, 7, 1, 6, 5, dtype)
    for nothing in (
        run(p, backend, mask=torch.zeros(3, 7, dtype=torch.bool)),
        run(p, backend, values=p.values[:, :0], noise_var=p.noise_var[:, :0]),
    ):
        assert torch.equal(nothing.state.mean, p.state.mean)
        assert torch.equal(nothing.state.cov, p.state.cov)


def test_zero_mean_stays_zero(backend, dtype):
    """Its weights are zero, so there is nothing to write with."""
    p = problem(2, 5, 1, 6, 4, dtype)
    empty = p.state._replace(mean=torch.zeros_like(p.state.mean))
    result = run(p, backend, state=empty)
    assert (result.weights == 0).all()
    assert (result.state.mean == 0).all()
    assert torch.equal(result.state.cov, p.state.cov)


@pytest.mark.parametrize("form", ["float", "0-d", "B", "BT"])
def test_noise_may_be_given_in_four_forms(form, backend, dtype):
    p = problem(3, 5, 1, 6, 4, dtype)
    full = torch.full((3, 5), 0.75, dtype=dtype)
    given_as = {"float": 0.75, "0-d": full[0, 0], "B": full[:, 0], "BT": full}
    assert oracle.equal(run(p, backend, noise_var=given_as[form]), run(p, backend, noise_var=full))


@pytest.mark.parametrize("form", ["float", "0-d"])
def test_ridge_may_be_given_in_three_forms(form, backend, dtype):
    p = problem(3, 5, 1, 6, 4, dtype)
    full = torch.full((3,), 0.75, dtype=dtype)
    given_as = {"float": 0.75, "0-d": full[0]}[form]
    assert oracle.equal(run(p, backend, ridge=given_as), run(p, backend, ridge=full))


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty_axes(shape, backend, dtype):
    B, T, _, K, C = shape
    p = problem(*shape, dtype)
    result = run(p, backend)
    got = {name: tuple(x.shape) for name, x in oracle.flat(result).items()}
    assert got == {"mean": (B, K, C), "cov": (B, K, K), "weights": (B, T, K), "innovation_var": (B, T), "kl": (B, T)}
    if B:
        assert_result(result, truth(p))


PRESETS = {"S": (2, 32, 1, 32, 100), "M": (2, 64, 1, 64, 200), "L": (1, 64, 1, 128, 200), "LLM": (1, 4, 1, 512, 768)}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_in_float32(preset, backend):
    """At full size the truth is the reference in float64, itself held to the oracle above."""
    p = problem(*PRESETS[preset], torch.float32)
    exact = oracle.flat(run(oracle.map_tensors(p, torch.Tensor.double), "reference"))
    oracle.judge(run, p, exact, backend, draws=3)


def near_copies(values):
    """Patterns that differ from the first by a hundredth."""
    return values[:, :1] + 0.01 * values


# Shape, and what is changed. Patterns that nearly repeat are small differences of large inner products: Gram space
# loses digits of them, so such memories are computed again in float64.
HARD = {
    "long stream": ((8, 200, 1, 17, 24), {}),
    "long stream, few columns": ((8, 200, 1, 17, 9), {}),
    "small ridge": ((8, 64, 1, 17, 24), {"ridge": lambda x: 0.01 * x}),
    "small noise": ((8, 64, 1, 17, 24), {"noise_var": lambda x: 0.01 * x}),
    "near copies": ((8, 64, 1, 17, 24), {"values": near_copies}),
    "near copies, small ridge and noise": (
        (8, 64, 1, 17, 24),
        {"values": near_copies, "ridge": lambda x: 0.01 * x, "noise_var": lambda x: 0.01 * x},
    ),
}


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
@pytest.mark.parametrize("name", HARD)
def test_native_is_as_good_as_the_reference_where_rounding_grows(name):
    shape, changes = HARD[name]
    for seed in range(4):  # one draw can be right by luck
        p = problem(*shape, torch.float32, seed=seed)
        p = p._replace(**{field: change(getattr(p, field)) for field, change in changes.items()})
        exact = oracle.flat(run(oracle.map_tensors(p, torch.Tensor.double), "reference"))
        oracle.judge(run, p, exact, "native")


# ---- small steps and little noise; the bounds are explained in test_posterior.py -----------------------------------


@pytest.mark.parametrize("options", [{}, {"num_opt_iters": 2}], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_a_weak_write_has_its_kl(size, options, backend):
    """A covariance of ``size`` beside a noise near 1: the weights do not depend on it, wᵀUw/σ² is about ``size``."""
    exact = problem(2, 20, 0, 7, 6)
    exact = exact._replace(state=exact.state._replace(cov=size * torch.eye(7, dtype=torch.float64).repeat(2, 1, 1)))
    p = oracle.map_tensors(exact, lambda x: x.float() if x.is_floating_point() else x)
    got, wanted = run(p, backend, **options), run(exact, "reference", **options)
    own = run(p, "reference", **options)
    assert (got.kl >= 0).all()
    # The weights have errors of their own, which the reference has too; the KL is a form of degree two in them.
    worst = max(oracle.error(x.weights, wanted.weights) for x in (got, own)) / oracle.largest(wanted.weights)
    bound = (4 * worst + 4 * (7 + 20) * torch.finfo(torch.float32).eps) * oracle.largest(wanted.kl)
    assert oracle.error(got.kl, wanted.kl) <= bound


@given(exponent=st.floats(-10, 0), rows=st.sampled_from([3, 8, 20]), seed=st.integers(0, 99))
def test_a_state_that_is_written_goes_in_again(exponent, rows, seed, backend):
    p = problem(2, 20, 0, rows, 12, torch.float32, seed=seed)
    state = p.state._replace(cov=torch.eye(rows).repeat(2, 1, 1))
    words = ""
    try:
        after = write(state, p.values, 10**exponent, 1.0, backend=backend).state
    except torch.linalg.LinAlgError as error:
        words = str(error)
    if words:
        assert "float64" in words
        return
    assert kl_memory(after, state, backend=backend).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"num_opt_iters": 2}, {"method": "deepmind"}], ids=str)
def test_what_is_wrong_is_named(options, backend, dtype):
    """A covariance that is fine is never blamed."""
    p = problem(3, 4, 0, 6, 4, dtype, masked=True)
    p = p._replace(mask=torch.ones(3, 4, dtype=torch.bool))
    for where, words in (("values", "values is not finite"), ("mean", r"state\.mean is not finite")):
        holed = oracle.map_tensors(p, torch.clone)
        (holed.values if where == "values" else holed.state.mean)[1, 0, 0] = math.nan
        with pytest.raises(torch.linalg.LinAlgError, match=rf"^{words} in memory \[1\]$"):
            run(holed, backend, **options)
    if options.get("method") == "deepmind":
        return  # a singular G² may keep a pivot by rounding
    ridge = torch.tensor([1.0, 1.0, 1e-30], dtype=dtype)
    mean = p.state.mean.clone()
    mean[2] = 1
    words = r"^mean meanᵀ \+ ridge I is not positive definite in memory \[2\]: .* a larger ridge$"
    with pytest.raises(torch.linalg.LinAlgError, match=words):
        run(p, backend, ridge=ridge, state=p.state._replace(mean=mean), **options)


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_few_columns_and_a_small_ridge_are_no_trouble():
    """Weights are ten thousand times too large where a float32 Gram matrix of rank two is inverted."""
    p = problem(4, 20, 1, 63, 2, torch.float32)
    p = p._replace(ridge=torch.full_like(p.ridge, 1e-5), noise_var=torch.full_like(p.noise_var, 28.0))
    exact = truth(p)
    got = oracle.flat(run(p, "native"))
    for name, wanted in exact.items():
        assert oracle.error(got[name], wanted) <= 4 * torch.finfo(torch.float32).eps * oracle.largest(wanted), name


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_a_memory_that_is_computed_again_leaves_the_others_alone():
    p = problem(5, 12, 1, 20, 8, torch.float32)
    ridge = p.ridge.clone()
    ridge[2] = 1e-6
    both, plain = run(p, "native", ridge=ridge), run(p, "native")
    for x, y in zip(oracle.flat(both).values(), oracle.flat(plain).values(), strict=True):
        assert torch.equal(x[[0, 1, 3, 4]], y[[0, 1, 3, 4]])
    alone = oracle.map_tensors(p._replace(ridge=ridge), lambda x: x[2:3])
    for x, y in zip(oracle.flat(both).values(), oracle.flat(run(alone, "native")).values(), strict=True):
        assert torch.equal(x[2:3], y)


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_ten_patterns_written_over_and_over_go_in_again_or_are_refused():
    p = problem(1, 10, 0, 32, 24, torch.float32)
    state = p.state._replace(cov=torch.eye(32).unsqueeze(0))
    words = ""
    for _ in range(2000):
        try:
            state = write(state, p.values, 1e-2, 1e-2, backend="native").state
        except torch.linalg.LinAlgError as error:
            words = str(error)
            break
        assert torch.linalg.cholesky_ex(state.cov).info.item() == 0
    assert not words or "float64" in words
