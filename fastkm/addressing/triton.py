"""Triton kernels of solve_addressing: a solve is a read of one iteration without values."""

import torch

import fastkm._linalg.triton.ridge_backward  # noqa: F401  implements the gradient
from fastkm._linalg.triton.launch import implements
from fastkm._linalg.triton.ridge import launch_read
from fastkm._runtime.autograd import differentiable

IEEE = 0  # the precision code of a solve


@implements("solve_addressing")
def solve_addressing_launcher(mean, queries, ridge, squared_gram):
    return launch_read(mean, queries, ridge, 1, squared_gram, IEEE, with_values=False)[1:]


solve_addressing = differentiable(
    torch.ops.fastkm_triton.solve_addressing.default,
    torch.ops.fastkm_triton.read_backward.default,
    lambda mean, queries, ridge, squared_gram, grad: (mean, queries, ridge, 1, squared_gram, IEEE, None, grad),
)
