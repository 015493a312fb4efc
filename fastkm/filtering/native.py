"""The compiled operator and its gradient; csrc/bindings/filtering.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import differentiable

_operators = torch.ops.fastkm

filter_posterior = differentiable(_operators.filter_posterior.default, _operators.filter_posterior_backward.default)
