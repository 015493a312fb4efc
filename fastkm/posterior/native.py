"""The compiled operator; csrc/posterior_cpu.cpp."""

import torch

import fastkm._schema  # noqa: F401  declares the operator

update_posterior = torch.ops.fastkm.update_posterior.default
