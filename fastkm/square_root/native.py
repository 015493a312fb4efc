"""The compiled operator; csrc/bindings/square_root.cpp. Gradients are those of the reference."""

import torch

import fastkm._runtime.schema  # noqa: F401  defines the operators
from fastkm._runtime.autograd import without_gradient

update_square_root = without_gradient(torch.ops.fastkm.update_square_root.default)
