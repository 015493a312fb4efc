"""The compiled operators and their gradients; csrc/bindings/reading.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import differentiable, without_gradient
from fastkm.reading.attractor import attractor_of
from fastkm.reading.gradients import backward_arguments

_operators = torch.ops.fastkm

read = differentiable(_operators.read.default, _operators.read_backward.default, backward_arguments)
read_factored = differentiable(
    _operators.read_factored.default, _operators.read_factored_backward.default, backward_arguments
)
attractor_read = attractor_of(without_gradient(_operators.factor_addressing.default), read_factored)
