"""The compiled operator and its gradient; csrc/bindings/posterior.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import differentiable

_operators = torch.ops.fastkm

update_posterior = differentiable(_operators.update_posterior.default, _operators.update_posterior_backward.default)
update_posterior_into = _operators.update_posterior_into.default
