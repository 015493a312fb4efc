"""solve_addressing: the ridge, its dual, the released code's other solve."""

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import EMPTY_SHAPES, SHAPES, assert_close, batched, call, problem

from fastkm import solve_addressing

METHODS = ["ridge", "deepmind"]


def judge(p, method, backend):
    exact = batched(oracle.solve, p.state.mean, p.queries, p.ridge, squared=method == "deepmind")
    oracle.judge(lambda p, b: call("solve_addressing", p, b, method=method), p, exact, backend)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_the_least_squares_solution(shape, method, backend, dtype):
    judge(problem(*shape, dtype), method, backend)


@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 20, 20, 20)]),
    layout=st.sampled_from(oracle.LAYOUTS),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 99),
)
def test_weights_of_any_shape_and_layout(sizes, layout, method, seed, backend):
    B, Q, K, C = sizes
    judge(oracle.map_tensors(problem(B, 0, Q, K, C, seed=seed), lambda x: oracle.poisoned(x, layout)), method, backend)


@pytest.mark.parametrize("sizes", [(12, 4), (4, 12), (7, 7)], ids=str)
def test_dual_form(sizes, backend):
    """(R Rᵀ + λI_K)⁻¹ R z = R (Rᵀ R + λI_C)⁻¹ z."""
    K, C = sizes
    p = problem(3, 0, 5, K, C)
    mean = p.state.mean
    inner = mean.mT @ mean + torch.diag_embed(p.ridge.unsqueeze(-1).expand(3, C))
    dual = (mean @ torch.cholesky_solve(p.queries.mT, torch.linalg.cholesky(inner))).mT
    assert_close(solve_addressing(mean, p.queries, p.ridge, backend=backend), dual)


def test_weights_are_the_minimum(backend):
    """The gradient of ‖z − Rᵀw‖² + λ‖w‖² vanishes there."""
    p = problem(3, 0, 5, 8, 6)
    weights = solve_addressing(p.state.mean, p.queries, p.ridge, backend=backend)
    target = p.queries @ p.state.mean.mT
    gradient = weights @ (p.state.mean @ p.state.mean.mT) + p.ridge.view(-1, 1, 1) * weights - target
    assert oracle.largest(gradient) <= 1e-12 * oracle.largest(target)


def test_weights_are_linear_in_the_queries(backend):
    p = problem(2, 0, 6, 9, 5)
    mix = torch.randn(3, 6, dtype=torch.float64)
    weights = solve_addressing(p.state.mean, p.queries, p.ridge, backend=backend)
    assert_close(solve_addressing(p.state.mean, mix @ p.queries, p.ridge, backend=backend), mix @ weights)


def test_large_ridge_leaves_the_matched_filter(backend):
    """λ w → R z as λ → ∞, with an error of ‖G‖/λ."""
    p = problem(2, 0, 4, 6, 5)
    ridge = 1e8
    weights = solve_addressing(p.state.mean, p.queries, ridge, backend=backend)
    target = p.queries @ p.state.mean.mT
    gram = torch.linalg.matrix_norm(p.state.mean, 2).square().max().item()
    bound = 2 * gram / ridge * target.norm(dim=-1).max().item()
    assert oracle.largest(ridge * weights - target) <= bound


def test_the_two_methods_differ(backend):
    p = problem(2, 0, 4, 6, 5)
    ridge, deepmind = (solve_addressing(p.state.mean, p.queries, p.ridge, method=m, backend=backend) for m in METHODS)
    assert oracle.error(ridge, deepmind) > 0.01 * oracle.largest(ridge)


@pytest.mark.parametrize("form", ["float", "0-d"])
def test_ridge_may_be_given_in_three_forms(form, backend, dtype):
    p = problem(3, 0, 4, 6, 5, dtype)
    full = torch.full((3,), 0.75, dtype=dtype)
    given_as = {"float": 0.75, "0-d": full[0]}[form]
    one = solve_addressing(p.state.mean, p.queries, given_as, backend=backend)
    assert torch.equal(one, solve_addressing(p.state.mean, p.queries, full, backend=backend))


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_empty_axes(shape, method, backend, dtype):
    B, _, Q, K, _ = shape
    p = problem(*shape, dtype)
    weights = solve_addressing(p.state.mean, p.queries, p.ridge, method=method, backend=backend)
    assert weights.shape == (B, Q, K)
    if shape[-1] == 0:
        assert (weights == 0).all(), "codes of size 0 say nothing about the weights"
