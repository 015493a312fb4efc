"""The specification in plain PyTorch: the update pattern by pattern, and the block form that equals it."""

import math

import torch
from torch import Tensor

from fastkm._linalg.reference import first_failure, symmetry
from fastkm._runtime.status import NOT_POSITIVE_DEFINITE


def update_sequential(mean, cov, weights, values, noise_var):
    """One rank-1 update a pattern: the definition of the operation. Returns (mean, cov, s [B, T])."""
    innovation_var = []
    for w, z, noise in zip(weights.unbind(1), values.unbind(1), noise_var.unbind(1), strict=True):
        a = (cov @ w.unsqueeze(-1)).squeeze(-1)  # [B, K]
        s = (w * a).sum(-1) + noise  # [B]
        delta = z - (w.unsqueeze(1) @ mean).squeeze(1)  # [B, C]
        mean = mean + a.unsqueeze(-1) * (delta / s.unsqueeze(-1)).unsqueeze(1)
        cov = cov - a.unsqueeze(-1) * (a / s.unsqueeze(-1)).unsqueeze(1)
        innovation_var.append(s)
    return mean, cov, torch.stack(innovation_var, 1) if innovation_var else noise_var.clone()


def update_block(mean, cov, weights, values, noise_var, mask, precision=0):
    """All patterns at once; see :func:`fastkm.update_posterior` for the equations. ``precision`` is for GPU kernels."""
    if mask is not None:
        weights = weights.masked_fill(~mask.unsqueeze(-1), 0)
        values = values.masked_fill(~mask.unsqueeze(-1), 0)
    projected = weights @ cov  # V [B, T, K]
    predictive = projected @ weights.mT + torch.diag_embed(noise_var)  # S [B, T, T]
    factor, failed = torch.linalg.cholesky_ex(predictive)  # L [B, T, T]
    gain = torch.linalg.solve_triangular(factor, projected, upper=False)  # G [B, T, K]
    error = torch.linalg.solve_triangular(factor, values - weights @ mean, upper=False)  # E [B, T, C]

    pivots = factor.diagonal(dim1=-2, dim2=-1).square()  # [B, T]
    info = covariance_status(cov, pivots, noise_var, predictive.diagonal(dim1=-2, dim2=-1), failed)
    innovation_var = torch.maximum(pivots, noise_var)
    kl, log_evidence = information(innovation_var, noise_var, error, mask)
    return mean + gain.mT @ error, cov - gain.mT @ gain, innovation_var, kl, log_evidence, info


def information(innovation_var, noise_var, error, mask):
    """KL of every step and the log evidence, from the whitened errors ``E_t = δ_t / √s_t``.

    With ``β = wᵀUw/s = 1 − σ²/s``:  KL_t = ½ [C (ln(s/σ²) − β) + β ‖E_t‖²].
    """
    code_size, energy = error.shape[-1], error.square().sum(-1)  # [B, T]
    beta = 1 - noise_var / innovation_var
    kl = 0.5 * (code_size * ((innovation_var / noise_var).log() - beta) + beta * energy)
    log_likelihood = -0.5 * (code_size * (2 * math.pi * innovation_var).log() + energy)
    if mask is not None:
        log_likelihood = log_likelihood * mask
    return kl, log_likelihood.sum(-1)


def covariance_status(cov: Tensor, pivots: Tensor, noise_var: Tensor, variances: Tensor, failed: Tensor) -> Tensor:
    """Status of each memory. A positive definite ``cov`` never lets a pivot of S fall below σ²."""
    eps = torch.finfo(cov.dtype).eps
    rounding = 4 * (cov.shape[-1] + pivots.shape[-1]) * eps * variances.detach().abs()
    indefinite = (failed != 0) | ~(pivots >= noise_var - rounding).all(-1)
    return first_failure(symmetry(cov), NOT_POSITIVE_DEFINITE * indefinite.int())
