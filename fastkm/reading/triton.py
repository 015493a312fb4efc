"""Triton kernels of read and of the two steps of attractor_read; they stand in ``_linalg/triton/ridge*.py``."""

import torch

import fastkm._linalg.triton.ridge_backward
import fastkm._linalg.triton.ridge_factored  # noqa: F401  both implement operators
from fastkm._linalg.triton.launch import implements
from fastkm._linalg.triton.ridge import launch_read
from fastkm._runtime.autograd import differentiable
from fastkm.reading.attractor import without_gradient

_operators = torch.ops.fastkm_triton


@implements("read")
def read_launcher(mean, queries, ridge, num_iters, squared_gram, precision):
    return launch_read(mean, queries, ridge, num_iters, squared_gram, precision, with_values=True)


read = differentiable(_operators.read.default, _operators.read_backward.default)
attractor_read = without_gradient(_operators.factor_addressing.default, _operators.solve_factored.default)
