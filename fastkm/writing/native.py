"""The compiled operator and its gradient; csrc/bindings/writing.cpp."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import differentiable

_operators = torch.ops.fastkm

WEIGHTS = 2  # the output that the backward takes
write = differentiable(_operators.write.default, _operators.write_backward.default, keep=(WEIGHTS,))
write_into = _operators.write_into.default
write_gram = _operators.write_gram.default  # without a gradient, and on a CPU only
