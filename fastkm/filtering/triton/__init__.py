"""Triton kernels of filter_posterior: the chunks of a sequence in ``forward``, their gradient in ``backward``."""

import torch

import fastkm.filtering.triton.backward
import fastkm.filtering.triton.forward  # noqa: F401  both implement operators
from fastkm._runtime.autograd import differentiable

_operators = torch.ops.fastkm_triton

filter_posterior = differentiable(_operators.filter_posterior.default, _operators.filter_posterior_backward.default)
