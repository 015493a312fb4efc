"""read, solve_addressing and the factor they share, on the GPU kernels."""

import functools

import oracle
import pytest
import torch
from oracle import batched, map_tensors, poisoned, problem

import fastkm
from gpu.support import SHAPES

# Queries over tiles, of few memories.
SHAPES = [*SHAPES[1:3], (2, 1, 67, 40, 70)]
METHODS = ("ridge", "deepmind")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize("shape", [(16, 1, 1, 1, 1), *SHAPES], ids=str)
def test_every_read_out_is_the_next_query(kernels, shape, num_iters, method):
    p = problem(*shape, torch.float32)
    truth = functools.partial(oracle.read, num_iters=num_iters, squared=method == "deepmind")
    kernels.judge(
        "read", p, batched(truth, p.state.mean, p.queries, p.ridge), num_iters=num_iters, method=method
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_those_of_least_squares(kernels, shape, method):
    p = problem(*shape, torch.float32)
    truth = functools.partial(oracle.solve, squared=method == "deepmind")
    kernels.judge("solve_addressing", p, batched(truth, p.state.mean, p.queries, p.ridge), method=method)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factor_once_solve_again_and_again(kernels, shape):
    operators = torch.ops.fastkm if kernels.backend == "native" else torch.ops.fastkm_triton
    p = problem(*shape, torch.float32)
    mean, queries, ridge = kernels.put((p.state.mean, p.queries, p.ridge))
    lower, info = operators.factor_addressing(mean, ridge)
    assert not info.any()
    assert torch.equal(lower, lower.tril())
    wide = p.state.mean.double()
    matrix = wide @ wide.mT + torch.diag_embed(p.ridge.double().unsqueeze(-1).expand(wide.shape[:2]))
    oracle.assert_close(lower.cpu() @ lower.cpu().mT, matrix)
    again = operators.solve_factored(mean, lower, queries)
    oracle.assert_close(again, operators.solve_addressing(mean, queries, ridge, False)[0].double())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(kernels, shape, method):
    kernels.judge_gradient("read", problem(*shape, torch.float32), num_iters=3, method=method)
    kernels.judge_gradient("solve_addressing", problem(*shape, torch.float32), method=method)


def test_each_memory_alone_is_the_memory_in_the_batch(kernels):
    p = problem(3, 1, 40, 7, 6, torch.float32)
    together, alone = kernels.call("read", p), kernels.call("read", map_tensors(p, lambda x: x[1:2]))
    assert all(torch.equal(alone[name], together[name][1:2]) for name in alone)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layout_means_nothing(kernels, layout):
    p = problem(2, 1, 5, 7, 6, torch.float32)
    plain, hostile = (kernels.call("read", q) for q in (p, map_tensors(p, lambda x: poisoned(x, layout))))
    assert all(torch.equal(plain[name], hostile[name]) for name in plain)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_queries_are_read_as_they_are(kernels, low):
    p = problem(2, 1, 5, 7, 6, torch.float32)
    p = p._replace(queries=p.queries.to(low))
    narrow, wide = (kernels.call("read", q) for q in (p, p._replace(queries=p.queries.float())))
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)


def test_tf32_rounds_products_with_codes(kernels):
    p = problem(2, 1, 5, 20, 70, torch.float32)
    exact, close, coarse = (kernels.call("read", p, precision=x)["values"] for x in ("ieee", "tf32x3", "tf32"))
    assert oracle.error(close, exact) / oracle.largest(exact) < 2e-5
    assert 1e-5 < oracle.error(coarse, exact) / oracle.largest(exact) < 2e-2


def test_a_gram_matrix_that_cannot_be_factored_is_named(kernels):
    mean, queries = kernels.put((torch.ones(3, 4, 5), torch.ones(3, 2, 5)))
    mean[1] = float("inf")
    with pytest.raises(torch.linalg.LinAlgError, match=r"mean is not finite in memory \[1\]"):
        fastkm.read(mean, queries, 1.0, backend=kernels.backend)


@pytest.mark.parametrize("shape", oracle.EMPTY_SHAPES, ids=str)
def test_empty_axes(kernels, shape):
    p = problem(*shape, torch.float32)
    expected = kernels.call("read", p, "reference")
    for name, x in kernels.call("read", p).items():
        oracle.assert_close(x, expected[name].double(), name)


@pytest.mark.parametrize("tol", [None, 0.3])
@pytest.mark.parametrize("weight_var", [0.0, 0.2])
def test_attractor_read_factors_once_and_iterates(kernels, weight_var, tol):
    p = problem(3, 1, 18, 24, 40, torch.float32)
    truth = kernels.call(
        "attractor_read", map_tensors(p, lambda x: x.double()), "reference", weight_var=weight_var, tol=tol
    )
    kernels.judge("attractor_read", p, truth, weight_var=weight_var, tol=tol)


def test_attractor_read_has_no_gradient_and_says_so(kernels):
    p = kernels.put(problem(2, 1, 3, 4, 5, torch.float32))
    scale = torch.ones((), device=kernels.device, requires_grad=True)
    with pytest.raises(fastkm.BackendUnavailableError, match="what clean returned requires a gradient"):
        oracle.call("attractor_read", p, kernels.backend, clean=lambda x: x * scale)
