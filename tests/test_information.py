"""The information form: sums that commute, merging, and what is no information."""

import io

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


@pytest.mark.parametrize("change", ["mean", "cov"])
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
    file = io.BytesIO()
    torch.save(form, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)) is kind
    moved = torch.utils._pytree.tree_map(lambda x: x.to("meta"), form)
    assert isinstance(moved, kind)
    assert all(x.device.type == "meta" for x in moved)
