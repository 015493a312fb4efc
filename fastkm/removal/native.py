"""The compiled operators and their gradients; csrc/bindings/removal.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import differentiable

_operators = torch.ops.fastkm

remove_patterns = differentiable(_operators.remove_patterns.default, _operators.remove_patterns_backward.default)
replace_patterns = differentiable(_operators.replace_patterns.default, _operators.replace_patterns_backward.default)
