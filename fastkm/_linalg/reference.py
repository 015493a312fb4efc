"""What the reference forms of several families share: the status of a covariance."""

import torch
from torch import Tensor

from fastkm._runtime.status import ASYMMETRIC, NOT_POSITIVE_DEFINITE


def symmetry(cov: Tensor) -> Tensor:
    """Status [B]: not finite, or further from symmetric than rounding explains."""
    tolerance = torch.finfo(cov.dtype).eps ** 0.5
    gap, scale = (cov - cov.mT).abs().flatten(1), _largest(cov.abs()).unsqueeze(-1)
    finite = cov.isfinite().flatten(1).all(-1)
    status = torch.where((gap > tolerance * scale).any(-1), ASYMMETRIC, 0)
    return torch.where(finite, status, NOT_POSITIVE_DEFINITE).int()


def first_failure(status: Tensor, later: Tensor) -> Tensor:
    """``later`` where ``status`` is good."""
    return torch.where(status != 0, status, later)


def _largest(x: Tensor) -> Tensor:
    """Largest entry of each matrix [B]; 0 for an empty one."""
    return x.flatten(1).max(-1).values if x.shape[1:].numel() else x.new_zeros(x.shape[0])
