"""The information form: sums that commute, merging, and what is no information."""

import io
import re

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import EMPTY_SHAPES, SHAPES, problem

import fastkm
from fastkm import (
    InformationState,
    MemoryState,
    from_information,
    load_memory_state,
    merge_memories,
    save_memory_state,
    to_information,
    update_information,
    update_posterior,
)


def error(got, truth):
    """The largest error of a pair of tensors, each relative to its largest entry."""
    return max(
        (float((x.double() - y).abs().max() / y.abs().max()) for x, y in zip(got, truth, strict=True) if y.numel()),
        default=0.0,
    )


def write(p, *cuts):
    state = p.state
    for cut in cuts or (slice(None),):
        mask = None if p.mask is None else p.mask[:, cut]
        given = (p.weights[:, cut], p.values[:, cut], p.noise_var[:, cut])
        state = update_posterior(state, *given, mask=mask).state
    return state


# ---------------------------------------------------------------------------------------------------------- theorems


@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
def test_the_forms_are_inverse_to_each_other(shape, dtype):
    p = problem(*shape, dtype)
    form = to_information(p.state)
    assert form.precision.dtype == form.information.dtype == torch.float64
    assert torch.equal(form.precision, form.precision.mT)
    back = from_information(form, dtype=dtype)
    assert back.mean.dtype == back.cov.dtype == dtype
    assert error(back, [x.double() for x in p.state]) <= (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
def test_adding_patterns_is_an_update(shape, masked):
    p = problem(*shape, masked=masked)
    form = update_information(to_information(p.state), p.weights, p.values, p.noise_var, mask=p.mask)
    assert error(from_information(form), write(p)) <= 1e-12


def test_sums_commute():
    p = problem(3, 8, 1, 5, 4)
    start, order = to_information(p.state), torch.randperm(8)
    one = update_information(start, p.weights, p.values, p.noise_var)
    other = update_information(start, p.weights[:, order], p.values[:, order], p.noise_var[:, order])
    assert error(one, other) <= 1e-14


@pytest.mark.parametrize("noise", [1e-6, 1e-8, 1e-12])
def test_tiny_noise_keeps_the_directions_that_no_pattern_has_reached(noise):
    """Where sums in float32 lose them: the table of docs/math/living.md."""
    p = problem(2, 4, 1, 9, 3, torch.float32)
    form = update_information(to_information(p.state), p.weights, p.values, noise)
    exact = oracle.map_tensors(p, torch.Tensor.double)
    a = exact.weights @ exact.state.cov
    gain = torch.linalg.solve(a @ exact.weights.mT + noise * torch.eye(4, dtype=torch.float64), a)
    assert error([from_information(form).cov], [exact.state.cov - a.mT @ gain]) <= 64 * 2.2e-16 / noise


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 2], ids=str)
def test_merged_memories_are_one(shape):
    p = problem(*shape)
    parts = [write(p, slice(first, None, 3)) for first in range(3)]
    assert error(merge_memories(parts, p.state), write(p)) <= 1e-12
    assert error(merge_memories(parts[:1], p.state), parts[0]) <= 1e-12


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 2], ids=str)
def test_merged_float32_memories_have_the_error_of_one(shape):
    p = oracle.map_tensors(problem(*shape), torch.Tensor.float)
    parts = [write(p, slice(first, None, 3)) for first in range(3)]
    exact = oracle.map_tensors(p, torch.Tensor.double)
    want = write(exact)
    allowed = error(write(p), want) + torch.finfo(torch.float32).eps
    merged = merge_memories(parts, p.state)
    assert merged.mean.dtype == merged.cov.dtype == torch.float32
    assert error(merged, want) <= 2 * (
        allowed + sum(error(a, write(exact, slice(i, None, 3))) for i, a in enumerate(parts))
    )


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_any_number_of_memories_in_any_order(K, C, T, n, seed):
    p = problem(2, T, 1, K, C, seed=seed)
    parts = [write(p, slice(first, None, n)) for first in range(n)]
    assert error(merge_memories(parts[::-1], p.state), write(p)) <= 1e-11


def test_gradients_flow_through():
    p = problem(2, 3, 1, 3, 2)

    def through(mean, root, weights, values, noise):
        state = MemoryState(mean, root @ root.mT + torch.eye(3, dtype=torch.float64))
        form = update_information(to_information(state), weights, values, noise)
        return from_information(form)

    inputs = [x.clone().requires_grad_() for x in (*p.state, p.weights, p.values, p.noise_var)]
    assert torch.autograd.gradcheck(through, inputs)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_more_subtracted_than_added_is_refused():
    p = problem(3, 3, 1, 4, 5)
    precision, information = to_information(p.state)
    precision[1] -= 100 * torch.eye(4, dtype=torch.float64)
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"^information_state.precision is not positive definite in memory \[1\]$"
    ):
        from_information(InformationState(precision, information))
    crooked = precision.clone()
    crooked[0, 0, 1] += 1
    with pytest.raises(torch.linalg.LinAlgError, match=r"precision is not symmetric in memory \[0\]"):
        from_information(InformationState(crooked, information))


@pytest.mark.parametrize(("change", "dtype"), [("mean", torch.float64), ("cov", torch.float64), ("cov", torch.float32)])
def test_memories_of_different_priors_are_refused(change, dtype):
    p = problem(3, 4, 1, 9, 5, dtype)
    parts = [write(p, slice(first, None, 2)) for first in range(2)]
    mean, cov = (x.clone() for x in p.state)
    if change == "mean":
        mean[1] += torch.randn(9, 5, dtype=dtype)
        why = "its mean differs from that of prior where it has learnt nothing"
    else:
        cov[1] *= 0.1
        why = "it is less certain than prior along some direction"
    with pytest.raises(ValueError, match=rf"^states\[0\] was not written from prior: {why}, in memory \[1\]$"):
        merge_memories(parts, MemoryState(mean, cov))
    with pytest.raises(ValueError, match=r"^states\[1\] was not written"):
        merge_memories([MemoryState(mean, cov), parts[1]], MemoryState(mean, cov))


@pytest.mark.parametrize("noise", [1, 30, 300, 1e5])
def test_memories_of_weak_patterns_are_merged(noise, dtype):
    """A prior of mean zero: all that the memories have of their means is what the patterns gave."""
    torch.manual_seed(0)
    prior = MemoryState(torch.zeros(30, 16, 32, dtype=dtype), torch.eye(16, dtype=dtype).repeat(30, 1, 1))
    weights = torch.randn(30, 8, 16, dtype=dtype).softmax(-1)
    values = torch.randn(30, 8, 32, dtype=dtype)
    parts = [update_posterior(prior, weights[:, i::2], values[:, i::2], float(noise)).state for i in (0, 1)]
    whole = update_posterior(MemoryState(*(x.double() for x in prior)), weights.double(), values.double(), float(noise))
    # A float32 covariance near I holds what weak patterns taught to within its rounding, the mean likewise.
    assert error(merge_memories(parts, prior), whole.state) <= 64 * torch.finfo(dtype).eps


def test_a_wide_memory_is_refused_where_rounding_is_far_below():
    K = 512
    prior = MemoryState(torch.zeros(1, K, 1), torch.eye(K).unsqueeze(0))
    merge_memories([prior], prior)
    with pytest.raises(ValueError, match=r"it is less certain than prior along some direction, in memory \[0\]$"):
        merge_memories([MemoryState(prior.mean, 1.01 * prior.cov)], prior)


@pytest.mark.parametrize("change", ["mean", "cov"])
def test_a_compiled_merge_refuses_other_priors(change):
    p = problem(2, 4, 1, 6, 5)
    part = write(p)
    mean, cov = (x.clone() for x in p.state)
    merge = torch.compile(lambda state, prior: merge_memories([state], prior), backend="eager", fullgraph=True)
    assert error(merge(part, p.state), part) <= 1e-12
    if change == "mean":
        mean[1] += torch.randn(6, 5, dtype=mean.dtype)
    else:
        cov[1] *= 0.1
    with pytest.raises(RuntimeError, match=r"states\[0\] was not written from prior: it"):
        merge(part, MemoryState(mean, cov))


def test_under_vmap_an_error_names_map_and_memory():
    p = problem(2, 1, 1, 4, 3)
    prior = MemoryState(p.state.mean, 0.1 * p.state.cov)
    states = MemoryState(*(torch.stack([y, x]) for x, y in zip(p.state, prior, strict=True)))
    with pytest.raises(ValueError, match=r"in memories \[\[1, 0\], \[1, 1\]\]$"):
        torch.func.vmap(lambda mean, cov: merge_memories([MemoryState(mean, cov)], prior))(*states)


def test_what_is_not_finite_is_named():
    p = problem(2, 3, 1, 4, 5)
    form = to_information(p.state)
    mean, information, weights = (x.clone() for x in (p.state.mean, form.information, p.weights))
    for x in (mean, information, weights):
        x[1, 0, 0] = torch.nan
    bad, mask = MemoryState(mean, p.state.cov), torch.ones(2, 3, dtype=torch.bool)
    mask[1, 0] = False
    for call, words in (
        (lambda: to_information(bad), "state.mean is not finite"),
        (lambda: merge_memories([p.state, bad], p.state), "states[1].mean is not finite"),
        (lambda: merge_memories([p.state], bad), "prior.mean is not finite"),
        (
            lambda: from_information(form._replace(information=information)),
            "information_state.information is not finite",
        ),
        (lambda: update_information(form, weights, p.values, 1.0), "the new information form is not finite"),
    ):
        with pytest.raises(torch.linalg.LinAlgError, match=rf"^{re.escape(words)} in memory \[1\]$"):
            call()
    assert all(x.isfinite().all() for x in update_information(form, weights, p.values, 1.0, mask=mask))


def test_a_memory_beyond_its_dtype_is_refused():
    form = InformationState(1e-40 * torch.eye(3, dtype=torch.float64).unsqueeze(0), torch.zeros(1, 3, 2).double())
    assert from_information(form).cov.isfinite().all()
    with pytest.raises(torch.linalg.LinAlgError, match=r"beyond the range of float32 in memory \[0\]$"):
        from_information(form, dtype=torch.float32)


def test_another_form_is_refused_by_name():
    p = problem(2, 3, 1, 4, 5)
    state, given = p.state, (p.weights, p.values, 1.0)
    form, root = to_information(state), fastkm.to_square_root(state)
    for call, words in (
        (lambda: update_posterior(root, *given), "MemoryState(mean, cov), got SquareRootState"),
        (lambda: update_posterior(form, *given), "MemoryState(mean, cov), got InformationState"),
        (lambda: fastkm.update_square_root(state, *given), "SquareRootState(mean, root), got MemoryState"),
        (lambda: fastkm.from_square_root(state), "SquareRootState(mean, root), got MemoryState"),
        (lambda: update_information(state, *given), "InformationState(precision, information), got MemoryState"),
    ):
        with pytest.raises(TypeError, match=rf"must be an? {re.escape(words)}$"):
            call()
    assert oracle.equal(fastkm.from_square_root(tuple(root)), fastkm.from_square_root(root))


def test_memories_that_do_not_fit_are_refused():
    p, other = problem(2, 3, 1, 4, 5), problem(2, 3, 1, 5, 5)
    with pytest.raises(
        ValueError, match=r"^states\[1\].mean must have shape \[B, K, C\] = \[2, 4, 5\], got \[2, 5, 5\]"
    ):
        merge_memories([p.state, other.state], p.state)
    with pytest.raises(TypeError, match=r"^states\[0\].mean must be float64 like prior.mean, got float32"):
        merge_memories([MemoryState(*(x.float() for x in p.state))], p.state)
    with pytest.raises(ValueError, match=r"^states must hold at least one memory"):
        merge_memories([], p.state)
    with pytest.raises(TypeError, match=r"^states must be a list of MemoryState, got MemoryState"):
        merge_memories(p.state, p.state)


def test_arguments_are_checked_in_words():
    p = problem(2, 3, 1, 4, 5)
    form = to_information(p.state)
    with pytest.raises(ValueError, match=r"^weights must have shape \[B, T, K\]"):
        update_information(form, p.weights[..., :3], p.values, 1.0)
    with pytest.raises(ValueError, match=r"^noise_var must be positive and finite"):
        update_information(form, p.weights, p.values, 0.0)
    with pytest.raises(TypeError, match=r"^information_state must be an InformationState"):
        update_information(None, p.weights, p.values, 1.0)
    with pytest.raises(TypeError, match=r"^state must be a MemoryState"):
        to_information(3)
    with pytest.raises(TypeError, match=r"^dtype must be"):
        from_information(form, dtype=torch.float16)


def test_float32_patterns_beside_a_float64_form():
    p = problem(2, 3, 1, 4, 5, torch.float32)
    form = update_information(to_information(p.state), p.weights, p.values, p.noise_var)
    assert form.precision.dtype == torch.float64
    mixed = update_information(to_information(p.state), p.weights.double(), p.values, p.noise_var)
    assert oracle.equal(mixed, form)
    with pytest.raises(TypeError, match=r"^values must be float64 like information_state.precision, got int64"):
        update_information(to_information(p.state), p.weights, p.values.long(), p.noise_var)
    exact = oracle.map_tensors(p, torch.Tensor.double)
    assert error(from_information(form), write(exact)) <= 1e-12


# -------------------------------------------------------------------------------------------- saved, moved and exported


def forms():
    state = problem(2, 1, 1, 3, 4).state
    return [to_information(state), fastkm.to_square_root(state)]


@pytest.mark.parametrize("form", forms(), ids=lambda form: type(form).__name__)
def test_a_form_is_saved_and_loaded(form, tmp_path):
    kind = type(form)
    save_memory_state(form, tmp_path / "form.safetensors")
    loaded = load_memory_state(tmp_path / "form.safetensors", form=kind)
    assert type(loaded) is kind
    assert oracle.equal(loaded, form)
    with pytest.raises(ValueError, match=r"holds no memory state: it must hold mean and cov and nothing else"):
        load_memory_state(tmp_path / "form.safetensors")
    for wrong in (None, fastkm.AddressingFactor, []):
        with pytest.raises(TypeError, match=r"^form must be MemoryState, InformationState, SquareRootState, got "):
            load_memory_state(tmp_path / "form.safetensors", form=wrong)
    file = io.BytesIO()
    torch.save(form, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)) is kind
    moved = torch.utils._pytree.tree_map(lambda x: x.to("meta"), form)
    assert isinstance(moved, kind)
    assert all(x.device.type == "meta" for x in moved)
