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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factor_once_read_again_and_again(kernels, shape, method):
    p = problem(*shape, torch.float32)
    mean, queries, ridge = kernels.put((p.state.mean, p.queries, p.ridge))
    factor = fastkm.factor_addressing(mean, ridge, method=method, backend=kernels.backend)
    lower = factor.lower.cpu()
    assert torch.equal(lower, lower.tril())
    wide = p.state.mean.double()
    gram = wide @ wide.mT
    oracle.assert_close(factor.gram.cpu(), gram if method == "deepmind" else gram[:, :0])
    system = gram @ gram if method == "deepmind" else gram
    oracle.assert_close(lower @ lower.mT, system + torch.diag_embed(p.ridge.double()[:, None].expand(wide.shape[:2])))
    for num_iters in (1, 3):
        options = {"num_iters": num_iters, "backend": kernels.backend}
        again = fastkm.read_factored(factor, queries, **options)
        for got, exact in zip(again, fastkm.read(mean, queries, ridge, method=method, **options), strict=True):
            oracle.assert_close(got.cpu(), exact.double().cpu())
    weights = fastkm.solve_factored(factor, queries, backend=kernels.backend)
    exact = fastkm.solve_addressing(mean, queries, ridge, method=method, backend=kernels.backend)
    oracle.assert_close(weights.cpu(), exact.double().cpu())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_gradients_with_a_factor(kernels, shape, method):
    """Those of a read that factors anew, on the same backend."""
    p = problem(*shape, torch.float32)
    given = kernels.put((p.state.mean, p.queries, p.ridge))

    def gradients(read):
        leaves = [x.detach().clone().requires_grad_() for x in given]
        result = read(*leaves)
        return torch.autograd.grad(result, leaves, [x.detach() for x in result])

    def anew(mean, queries, ridge):
        return tuple(fastkm.read(mean, queries, ridge, num_iters=3, method=method, backend=kernels.backend))

    def in_two_steps(mean, queries, ridge):
        factor = fastkm.factor_addressing(mean, ridge, method=method, backend=kernels.backend)
        return tuple(fastkm.read_factored(factor, queries, num_iters=3, backend=kernels.backend))

    for got, expected in zip(gradients(in_two_steps), gradients(anew), strict=True):
        oracle.assert_close(got.cpu(), expected.double().cpu())


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


def test_gradients_of_an_attractor_read(kernels):
    """Through every iteration, to the memory, the queries and a parameter of the codec."""
    p = problem(2, 1, 3, 4, 5, torch.float32)

    def gradients(p, backend):
        mean, queries = (x.clone().requires_grad_() for x in (p.state.mean, p.queries))
        scale = torch.full((), 0.9, dtype=mean.dtype, device=mean.device, requires_grad=True)
        given = p._replace(state=p.state._replace(mean=mean), queries=queries)
        result = oracle.call("attractor_read", given, backend, clean=lambda x: x * scale)
        return torch.autograd.grad(result.values.square().sum() + result.energy.sum(), [mean, queries, scale])

    expected = gradients(map_tensors(p, torch.Tensor.double), "reference")
    for x, y in zip(gradients(kernels.put(p), kernels.backend), expected, strict=True):
        oracle.assert_close(x.cpu(), y)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_values_are_rounded_once_to_the_dtype_asked_for(kernels, low):
    p = problem(2, 1, 37, 7, 6, torch.float32)
    wide, narrow = kernels.call("read", p)["values"], kernels.call("read", p, out_dtype=low)["values"]
    assert narrow.dtype == low
    assert torch.equal(narrow, wide.to(low))
    wide, narrow = kernels.call("read_factored", p)["values"], kernels.call("read_factored", p, out_dtype=low)["values"]
    assert torch.equal(narrow, wide.to(low))
