"""Low-precision codes beside a float32 memory, and the rounding a call allows."""

import pytest
import torch
from oracle import problem
from torch.utils._pytree import tree_leaves

import fastkm

LOW = [torch.bfloat16, torch.float16]
# operation -> what it takes of a problem that may be of low precision, and how it is called
CALLS = {
    "update_posterior": (
        ("weights", "values"),
        lambda p, **options: fastkm.update_posterior(p.state, p.weights, p.values, p.noise_var, **options),
    ),
    "write": (("values",), lambda p, **options: fastkm.write(p.state, p.values, p.noise_var, p.ridge, **options)),
    "read": (("queries",), lambda p, **options: fastkm.read(p.state.mean, p.queries, p.ridge, **options)),
    "solve_addressing": (
        ("queries",),
        lambda p, **options: fastkm.solve_addressing(p.state.mean, p.queries, p.ridge, **options),
    ),
    "read_factored": (
        ("queries",),
        lambda p, **options: fastkm.read_factored(
            fastkm.factor_addressing(p.state.mean, p.ridge), p.queries, num_iters=2, **options
        ),
    ),
    "solve_factored": (
        ("queries",),
        lambda p, **options: fastkm.solve_factored(
            fastkm.factor_addressing(p.state.mean, p.ridge), p.queries, **options
        ),
    ),
}


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("operation", CALLS)
def test_low_precision_codes_are_read_and_computed_in_float32(operation, low, backend):
    names, call = CALLS[operation]
    p = problem(2, 5, 3, 4, 6, torch.float32)
    rounded = p._replace(**{name: getattr(p, name).to(low) for name in names})
    widened = p._replace(**{name: getattr(rounded, name).float() for name in names})
    for got, want in zip(
        tree_leaves(call(rounded, backend=backend)), tree_leaves(call(widened, backend=backend)), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("operation", CALLS)
def test_the_gradient_has_the_dtype_of_the_codes(operation, backend):
    names, call = CALLS[operation]
    p = problem(2, 5, 3, 4, 6, torch.float32)
    low = {name: getattr(p, name).bfloat16().requires_grad_() for name in names}
    wide = {name: x.detach().float().requires_grad_() for name, x in low.items()}
    for leaves in (low, wide):
        sum(x.sum() for x in tree_leaves(call(p._replace(**leaves), backend=backend))).backward()
    for name in names:
        assert low[name].grad.dtype == torch.bfloat16
        torch.testing.assert_close(low[name].grad, wide[name].grad.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("operation", CALLS)
def test_a_float64_memory_takes_no_low_precision(operation):
    names, call = CALLS[operation]
    p = problem(2, 5, 3, 4, 6)
    with pytest.raises(TypeError, match=rf"^{names[0]} must be float64 like .*, got bfloat16$"):
        call(p._replace(**{names[0]: getattr(p, names[0]).bfloat16()}))


@pytest.mark.parametrize("operation", ["update_posterior", "write", "read", "read_factored"])
def test_on_a_cpu_every_precision_is_float32(operation, backend):
    _, call = CALLS[operation]
    p = problem(2, 5, 3, 4, 6, torch.float32)
    exact = tree_leaves(call(p, backend=backend))
    for precision in ("tf32x3", "tf32"):
        for got, want in zip(tree_leaves(call(p, backend=backend, precision=precision)), exact, strict=True):
            assert torch.equal(got, want)
    with pytest.raises(ValueError, match="precision must be one of 'ieee', 'tf32x3', 'tf32', got 'fp32'"):
        call(p, backend=backend, precision="fp32")
