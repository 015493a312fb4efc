"""Triton kernels of read and read_factored; they stand in ``_linalg/triton/ridge*.py``."""

import torch

import fastkm._linalg.triton.ridge_backward
import fastkm._linalg.triton.ridge_factored  # noqa: F401  both implement operators
from fastkm._linalg.triton.launch import implements
from fastkm._linalg.triton.ridge import launch_read
from fastkm._runtime.autograd import differentiable, without_gradient
from fastkm._runtime.options import CODE_DTYPES
from fastkm.reading.attractor import attractor_of
from fastkm.reading.gradients import backward_arguments

_operators = torch.ops.fastkm_triton


@implements("read")
def read_launcher(mean, queries, ridge, num_iters, squared_gram, precision, values_type=None):
    values = mean.new_empty(queries.shape, dtype=CODE_DTYPES[values_type or 0])
    return values, *launch_read(mean, queries, ridge, num_iters, squared_gram, precision, values)


read = differentiable(_operators.read.default, _operators.read_backward.default, backward_arguments)
read_factored = differentiable(
    _operators.read_factored.default, _operators.read_factored_backward.default, backward_arguments
)
attractor_read = attractor_of(without_gradient(_operators.factor_addressing.default), read_factored)
