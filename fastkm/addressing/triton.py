"""Triton kernels of addressing: a solve is a read of one iteration without values."""

import torch

import fastkm._linalg.triton.ridge_backward
import fastkm._linalg.triton.ridge_factored  # noqa: F401  both implement operators
from fastkm._linalg.triton.launch import implements
from fastkm._linalg.triton.ridge import launch_read
from fastkm._runtime.autograd import differentiable, without_gradient

IEEE = 0  # the precision code of a solve
_operators = torch.ops.fastkm_triton


@implements("solve_addressing")
def solve_addressing_launcher(mean, queries, ridge, squared_gram):
    return launch_read(mean, queries, ridge, 1, squared_gram, IEEE, None)


solve_addressing = differentiable(
    _operators.solve_addressing.default,
    _operators.read_backward.default,
    lambda mean, queries, ridge, squared_gram, grad: (mean, queries, ridge, 1, squared_gram, IEEE, None, grad),
)
factor_addressing = without_gradient(_operators.factor_addressing.default)
solve_factored = differentiable(
    _operators.solve_factored.default,
    _operators.read_factored_backward.default,
    lambda *inputs_and_grad: (*inputs_and_grad[:-1], 1, IEEE, None, inputs_and_grad[-1]),
)
