"""The compiled operator; csrc/reading_cpu.cpp."""

from fastkm import _schema  # noqa: F401  declares the operator

import torch

read = torch.ops.fastkm.read.default
