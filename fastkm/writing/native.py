"""The compiled operator; csrc/writing_cpu.cpp."""

import torch

import fastkm._schema  # noqa: F401  declares the operator

write = torch.ops.fastkm.write.default
