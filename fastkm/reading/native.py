"""The compiled operator; csrc/reading_cpu.cpp."""

import torch

import fastkm._schema  # noqa: F401  declares the operator

read = torch.ops.fastkm.read.default
