"""The compiled operator; csrc/addressing_cpu.cpp."""

from fastkm import _schema  # noqa: F401  declares the operator

import torch

solve_addressing = torch.ops.fastkm.solve_addressing.default
