"""The specification in plain PyTorch: the update pattern by pattern, and the block form that equals it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkm._linalg.reference import clear_masked, first_failure, symmetry, variance_divergence, variance_status

# Patterns that are absorbed at once. The subtraction U − GᵀG rounds at the size of U, which more patterns would leave
# further behind.
CHUNK = 16


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
    """A chunk of patterns at once; see :func:`fastkm.update_posterior` for the equations. ``precision`` is for GPUs."""
    weights, values = clear_masked(weights, values, mask)
    info, explained, energy = symmetry(cov), [], []
    for w, z, noise in zip(*(x.split(CHUNK, 1) for x in (weights, values, noise_var)), strict=True):
        whitened = whiten(mean, cov, w, z, noise)
        mean, cov = mean + whitened.gain.mT @ whitened.error, cov - whitened.gain.mT @ whitened.gain
        info = first_failure(info, whitened.info)
        explained.append(whitened.explained), energy.append(whitened.error.square().sum(-1))
    explained = torch.cat(explained, 1)
    kl, log_evidence = information(explained, noise_var, torch.cat(energy, 1), values.shape[-1], mask)
    return mean, cov, explained + noise_var, kl, log_evidence, info


class Whitened(NamedTuple):
    """A chunk of t patterns, whitened against the memory before it."""

    gain: Tensor  # G [B, t, K]
    error: Tensor  # E [B, t, C]
    explained: Tensor  # wᵀUw before each pattern [B, t]
    info: Tensor  # [B]


def whiten(mean: Tensor, cov: Tensor, weights: Tensor, values: Tensor, noise_var: Tensor) -> Whitened:
    """``V = W U``, ``S = V Wᵀ + diag σ² = L Lᵀ``, ``G = L⁻¹ V``, ``E = L⁻¹ (Z − W R)``.

    ``w_tᵀ U_{t−1} w_t = L_tt² − σ_t²`` would lose the digits of a small step in σ². It is what the elimination leaves
    of ``V_t · w_t``, before σ² is added.
    """
    projected = weights @ cov  # V [B, t, K]
    factor, failed = torch.linalg.cholesky_ex(projected @ weights.mT + torch.diag_embed(noise_var))  # L [B, t, t]
    gain = torch.linalg.solve_triangular(factor, projected, upper=False)
    error = torch.linalg.solve_triangular(factor, values - weights @ mean, upper=False)
    variances = (projected * weights).sum(-1)
    explained = variances - factor.tril(-1).square().sum(-1)
    scale = weights.detach().square() @ cov.detach().diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # [B, t, 1]
    status = variance_status(cov.shape[-1], noise_var, variances, explained, scale.squeeze(-1), failed)
    return Whitened(gain, error, explained.clamp_min(0), status)


def information(explained, noise_var, energy, code_size, mask):
    """KL of every step and the log evidence, from ``wᵀUw`` and ``‖E_t‖²`` of the whitened errors ``E_t = δ_t / √s_t``.

    With ``β = wᵀUw/s``:  KL_t = ½ [C (ln(s/σ²) − β) + β ‖E_t‖²].
    """
    innovation_var = explained + noise_var
    beta = explained / innovation_var
    kl = 0.5 * (code_size * variance_divergence(noise_var / innovation_var, -beta) + beta * energy)
    log_likelihood = -0.5 * (code_size * (2 * math.pi * innovation_var).log() + energy)
    if mask is not None:
        log_likelihood = log_likelihood * mask
    return kl, log_likelihood.sum(-1)
