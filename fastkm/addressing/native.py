"""The compiled operator; csrc/addressing_cpu.cpp."""

import torch

import fastkm._schema  # noqa: F401  declares the operator

solve_addressing = torch.ops.fastkm.solve_addressing.default
