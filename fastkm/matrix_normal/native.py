"""The compiled operators; csrc/matrix_normal_cpu.cpp."""

import torch

import fastkm._schema  # noqa: F401  declares the operators

kl_memory = torch.ops.fastkm.kl_memory.default
logdet = torch.ops.fastkm.logdet.default
