"""The compiled operator; csrc/writing_cpu.cpp."""

from fastkm import _schema  # noqa: F401  declares the operator

import torch

write = torch.ops.fastkm.write.default
