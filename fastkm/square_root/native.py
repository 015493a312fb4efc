"""The compiled operator and its gradient; csrc/bindings/square_root.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import differentiable

_operators = torch.ops.fastkm

update_square_root = differentiable(
    _operators.update_square_root.default, _operators.update_square_root_backward.default
)
