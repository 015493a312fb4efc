"""The specification in plain PyTorch: Potter's update of a square root of the covariance, pattern by pattern."""

import torch

from fastkm._linalg.reference import clear_masked, factor_status
from fastkm._runtime.status import NOT_POSITIVE_DEFINITE


def update_sequential(mean, root, weights, values, noise_var, mask):
    """With ``U = S Sᵀ``: ``p = Sᵀw``, ``s = pᵀp + σ²``, ``S' = S − (S p) pᵀ / (√s (√s + σ))``."""
    weights, values = clear_masked(weights, values, mask)
    finite = torch.ones(root.shape[:1], dtype=torch.bool, device=root.device)
    for w, z, noise in zip(*(x.split(1, 1) for x in (weights, values, noise_var.unsqueeze(-1))), strict=True):
        p = w @ root  # [B, 1, K]
        deviation = (p.square().sum(-1, keepdim=True) + noise).sqrt()  # √s [B, 1, 1]
        finite = finite & deviation.detach().isfinite().flatten(1).all(-1)  # an infinite one would change nothing
        gain = root @ (p / deviation).mT  # [B, K, 1]
        mean = mean + gain @ ((z - w @ mean) / deviation)
        root = root - gain @ (p / (deviation + noise.sqrt()))
    finite = finite & root.detach().isfinite().flatten(1).all(-1)
    return mean, root, (NOT_POSITIVE_DEFINITE * ~finite).int()


def to_root(cov):
    """The lower Cholesky factor of U, and the status of each memory."""
    factor, failed = torch.linalg.cholesky_ex((cov + cov.mT) / 2)
    return factor, factor_status(factor, failed)
