"""The compiled operator and its gradient; csrc/writing_binding.cpp."""

import torch

import fastkm._schema  # noqa: F401  declares the operators
from fastkm._autograd import differentiable

operator = torch.ops.fastkm.write.default
write = differentiable(operator, torch.ops.fastkm.write_backward.default, keep=slice(2, 3))  # the weights it found
