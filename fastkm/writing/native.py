"""The compiled operator and its gradient; csrc/writing_binding.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  declares the operators
from fastkm._runtime.autograd import differentiable

_operators = torch.ops.fastkm

# What is kept are the weights it found.
write = differentiable(_operators.write.default, _operators.write_backward.default, keep=slice(2, 3))
