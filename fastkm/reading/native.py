"""The compiled operators, and the gradient of the one that has it; csrc/bindings/reading.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import differentiable
from fastkm.reading.attractor import without_gradient

_operators = torch.ops.fastkm

read = differentiable(_operators.read.default, _operators.read_backward.default)
attractor_read = without_gradient(_operators.factor_addressing.default, _operators.solve_factored.default)
