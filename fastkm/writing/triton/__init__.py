"""Triton kernels of write: the search for weights in ``forward``, its gradient in ``backward``."""

import torch

import fastkm.writing.triton.backward
import fastkm.writing.triton.forward  # noqa: F401  both implement operators
from fastkm._runtime.autograd import differentiable

write = differentiable(
    torch.ops.fastkm_triton.write.default,
    torch.ops.fastkm_triton.write_backward.default,
    keep=(2,),  # the weights it found
)
