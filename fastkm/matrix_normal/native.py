"""The compiled operators; csrc/matrix_normal_cpu.cpp."""

from fastkm import _schema  # noqa: F401  declares the operators

import torch

kl_memory = torch.ops.fastkm.kl_memory.default
logdet = torch.ops.fastkm.logdet.default
