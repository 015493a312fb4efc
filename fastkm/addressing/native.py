"""The compiled operators and their gradients; csrc/bindings/reading.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import differentiable, without_gradient

_operators = torch.ops.fastkm

solve_addressing = differentiable(
    _operators.solve_addressing.default,
    _operators.read_backward.default,
    # A solve is a read of one iteration that returns no values, so grad_values is None.
    lambda mean, queries, ridge, squared_gram, grad: (mean, queries, ridge, 1, squared_gram, 0, None, grad),
)
factor_addressing = without_gradient(_operators.factor_addressing.default)
solve_factored = differentiable(
    _operators.solve_factored.default,
    _operators.read_factored_backward.default,
    lambda *inputs_and_grad: (*inputs_and_grad[:-1], 1, 0, None, inputs_and_grad[-1]),
)
