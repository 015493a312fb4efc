"""The compiled operator and its gradient; csrc/posterior_binding.cpp."""

import torch

import fastkm._schema  # noqa: F401  declares the operators
from fastkm._autograd import differentiable

operator = torch.ops.fastkm.update_posterior.default
update_posterior = differentiable(operator, torch.ops.fastkm.update_posterior_backward.default)
