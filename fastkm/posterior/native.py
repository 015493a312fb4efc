"""The compiled operator; csrc/posterior_cpu.cpp."""

from fastkm import _schema  # noqa: F401  declares the operator

import torch

update_posterior = torch.ops.fastkm.update_posterior.default
