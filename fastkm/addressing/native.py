"""The compiled operator and its gradient; csrc/bindings/reading.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import differentiable

solve_addressing = differentiable(
    torch.ops.fastkm.solve_addressing.default,
    torch.ops.fastkm.read_backward.default,
    # A solve is a read of one iteration that returns no values, so grad_values is None.
    lambda mean, queries, ridge, squared_gram, grad: (mean, queries, ridge, 1, squared_gram, 0, None, grad),
)
