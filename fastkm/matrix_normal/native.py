"""The compiled operators and their gradients; csrc/bindings/matrix_normal.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import differentiable

_operators = torch.ops.fastkm

kl_memory = differentiable(_operators.kl_memory.default, _operators.kl_memory_backward.default)
logdet = differentiable(_operators.logdet.default, _operators.logdet_backward.default)
