"""Values that are not finite: carried in their column where weights are given, refused where the weights are sought."""

import pytest
import torch
from oracle import equal, map_tensors, problem

import fastkm
from fastkm import MemoryState, SquareRootState

SHAPES = [(2, 3, 1, 4, 5), (2, 20, 1, 40, 50)]  # in the lanes of vector registers, and in matrices
MEMORY, PATTERN, COLUMN = 1, 1, 2
CALLS = {
    "update": lambda p, values, **how: fastkm.update_posterior(p.state, p.weights, values, p.noise_var, **how),
    "filter": lambda p, values, **how: fastkm.filter_posterior(
        p.state, p.weights, values, p.weights, p.noise_var, **how
    )._replace(values=p.noise_var),
    "square root": lambda p, values, **how: fastkm.update_square_root(
        SquareRootState(p.state.mean, torch.linalg.cholesky(p.state.cov)), p.weights, values, p.noise_var, **how
    ),
    "remove": lambda p, values, **how: fastkm.remove_patterns(written(p), p.weights, values, p.noise_var, **how),
    "replace": lambda p, values, **how: fastkm.replace_patterns(
        written(p), p.weights, p.values, p.weights, values, p.noise_var, **how
    ),
}


def written(p):
    return fastkm.update_posterior(p.state, p.weights, p.values, p.noise_var).state


def poisoned(values, by):
    values = values.clone()
    values[MEMORY, PATTERN, COLUMN] = by
    return values


def state_of(result):
    return getattr(result, "state", result)


@pytest.mark.parametrize("by", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_with_given_weights_only_the_column_of_the_value_is_lost(name, shape, by, dtype, backend):
    """Columns share nothing but the covariance, which does not depend on values."""
    p = map_tensors(problem(*shape), lambda x: x.to(dtype))
    found = state_of(CALLS[name](p, poisoned(p.values, by), backend=backend))
    expected = state_of(CALLS[name](p, p.values, backend=backend))
    assert not found.mean[MEMORY, :, COLUMN].isfinite().any()
    kept = torch.ones(shape[4], dtype=torch.bool)
    kept[COLUMN] = False
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found.mean[..., kept], expected.mean[..., kept])
    assert torch.equal(found.mean[0], expected.mean[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_depends_on_all_columns_says_so(shape, backend):
    p = problem(*shape)
    found = CALLS["update"](p, poisoned(p.values, torch.nan), backend=backend)
    assert found.log_evidence.isnan().tolist() == [False, True]
    assert found.kl[MEMORY, PATTERN:].isnan().all()
    assert found.kl[0].isfinite().all()
    assert found.innovation_var.isfinite().all()


@pytest.mark.parametrize("by", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_weights_are_sought_or_sums_are_kept_the_memory_is_refused(shape, by, backend):
    p = problem(*shape)
    values = poisoned(p.values, by)
    with pytest.raises(torch.linalg.LinAlgError, match=r"values is not finite in memory \[1\]"):
        fastkm.write(p.state, values, p.noise_var, p.ridge, backend=backend)
    form = fastkm.to_information(p.state)
    with pytest.raises(torch.linalg.LinAlgError, match=r"not finite in memory \[1\]"):
        fastkm.update_information(form, p.weights, values, p.noise_var)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_never_carried(shape, backend):
    p = problem(*shape)
    weights = p.weights.clone()
    weights[MEMORY, PATTERN, COLUMN] = torch.nan
    for call in (fastkm.update_posterior, fastkm.remove_patterns):
        state = p.state if call is fastkm.update_posterior else written(p)
        with pytest.raises(torch.linalg.LinAlgError, match=r"weights is not finite in memory \[1\]"):
            call(MemoryState(*state), weights, p.values, p.noise_var, backend=backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_masked_value_is_not_read(name, shape, backend):
    p = problem(*shape)
    mask = torch.ones(shape[:2], dtype=torch.bool)
    mask[MEMORY, PATTERN] = False
    found = CALLS[name](p, poisoned(p.values, torch.nan), mask=mask, backend=backend)
    assert equal(found, CALLS[name](p, p.values, mask=mask, backend=backend))
