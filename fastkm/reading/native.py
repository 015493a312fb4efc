"""The compiled operator and its gradient; csrc/reading_binding.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  declares the operators
from fastkm._runtime.autograd import differentiable
from fastkm.reading import reference

_operators = torch.ops.fastkm

read = differentiable(_operators.read.default, _operators.read_backward.default)
attractor_read = reference.without_gradient(_operators.factor_addressing.default, _operators.solve_factored.default)
