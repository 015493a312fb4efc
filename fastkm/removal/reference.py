"""The specification in plain PyTorch: a removal is the update of a covariance with the opposite sign."""

import torch

from fastkm._linalg.reference import clear_masked, first_failure, removal_status, symmetry
from fastkm.posterior.reference import CHUNK, update_block


def remove_sequential(mean, cov, weights, values, noise_var):
    """One rank-1 removal a pattern: the definition of the operation. Returns (mean, cov)."""
    for w, z, noise in zip(weights.unbind(1), values.unbind(1), noise_var.unbind(1), strict=True):
        a = (cov @ w.unsqueeze(-1)).squeeze(-1)  # [B, K]
        s = noise - (w * a).sum(-1)  # [B]
        delta = z - (w.unsqueeze(1) @ mean).squeeze(1)  # [B, C]
        mean = mean - a.unsqueeze(-1) * (delta / s.unsqueeze(-1)).unsqueeze(1)
        cov = cov + a.unsqueeze(-1) * (a / s.unsqueeze(-1)).unsqueeze(1)
    return mean, cov


def remove_block(mean, cov, weights, values, noise_var, mask):
    """``V = W U``, ``diag σ² − V Wᵀ = L Lᵀ``, ``G = L⁻¹V``, ``E = L⁻¹(Z − W R)``, ``R − GᵀE``, ``U + GᵀG``."""
    weights, values = clear_masked(weights, values, mask)
    info = symmetry(cov)
    for w, z, noise in zip(*(x.split(CHUNK, 1) for x in (weights, values, noise_var)), strict=True):
        projected = w @ cov
        factor, failed = torch.linalg.cholesky_ex(torch.diag_embed(noise) - projected @ w.mT)
        gain = torch.linalg.solve_triangular(factor, projected, upper=False)
        error = torch.linalg.solve_triangular(factor, z - w @ mean, upper=False)
        scale = (w.square() @ cov.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).squeeze(-1)
        info = first_failure(info, removal_status(cov.shape[-1], noise, factor, scale, failed))
        mean, cov = mean - gain.mT @ error, cov + gain.mT @ gain
    return mean, cov, info


def replace_block(mean, cov, old_weights, old_values, weights, values, noise_var, old_noise_var, mask):
    """New patterns in, old ones out. In this order no covariance on the way is wider than the last one."""
    mean, cov, *_, info = update_block(mean, cov, weights, values, noise_var, mask)
    mean, cov, removed = remove_block(mean, cov, old_weights, old_values, old_noise_var, mask)
    return mean, cov, first_failure(info, removed)
