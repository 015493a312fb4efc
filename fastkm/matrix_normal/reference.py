"""The specification in plain PyTorch: Kullback-Leibler divergences and log-determinants by Cholesky."""

import torch
from torch import Tensor

from fastkm._linalg.reference import first_failure, symmetry, variance_divergence
from fastkm._runtime.status import NOT_POSITIVE_DEFINITE


def kl_weights(weights, weight_var, prior_var):
    """KL(N(w, σw² I) ‖ N(0, σ0² I)) over the last axis of ``weights``."""
    weight_var = torch.as_tensor(weight_var, dtype=weights.dtype, device=weights.device)
    spread = variance_divergence(weight_var / prior_var, (weight_var - prior_var) / prior_var)
    return 0.5 * (weights.square().sum(-1) / prior_var + weights.shape[-1] * spread)


def factor_covariance(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor [B, K, K] and status [B] of a covariance."""
    factor, failed = torch.linalg.cholesky_ex(cov)
    return factor, first_failure(symmetry(cov), NOT_POSITIVE_DEFINITE * (failed != 0).int())


def log_det_of_factor(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def logdet(cov):
    factor, info = factor_covariance(cov)
    return log_det_of_factor(factor), info


def kl_memory(mean, cov, prior_mean, prior_cov):
    """½ [C tr(U0⁻¹U) + tr(ΔᵀU0⁻¹Δ) − KC + C (ln|U0| − ln|U|)], as a sum of terms that are not negative.

    With ``M = L0⁻¹L``, whose diagonal is ``m``:  KL = ½ [C (Σ (m_i² − 1 − ln m_i²) + Σ_{i>j} M_ij²) + ‖L0⁻¹Δ‖²].
    """
    columns = mean.shape[-1]
    factor, info = factor_covariance(cov)
    prior_factor, prior_info = factor_covariance(prior_cov)
    ratio, excess, below = relative_factor(factor, prior_factor)
    spread = variance_divergence(ratio, excess).sum(-1) + below.square().sum((-2, -1))
    shift = torch.linalg.solve_triangular(prior_factor, mean - prior_mean, upper=False).square().sum((-2, -1))
    return 0.5 * (columns * spread + shift), torch.maximum(info, prior_info)


def relative_factor(factor: Tensor, prior_factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``m²``, ``m² − 1`` and ``M`` below its diagonal ``m``, for ``M = L0⁻¹L``; near M = I each keeps its digits.

    With ``D = diag(m)``, ``M − D = L0⁻¹(L − L0 D)``, whose right side is zero on the diagonal and above.
    """
    own, prior = (x.diagonal(dim1=-2, dim2=-1) for x in (factor, prior_factor))
    m, gap = own / prior, (own - prior) / prior
    below = (factor - prior_factor * m.unsqueeze(-2)).tril(-1)
    return m * m, gap * (2 + gap), torch.linalg.solve_triangular(prior_factor, below, upper=False)


def kl_memory_deepmind(mean, cov, prior_mean, prior_cov):
    """The released code's formula: diagonals only, and without the factor ½."""
    columns = mean.shape[-1]
    var, prior_var = cov.diagonal(dim1=-2, dim2=-1), prior_cov.diagonal(dim1=-2, dim2=-1)  # [B, K]
    shift = ((mean - prior_mean).square().sum(-1) / prior_var).sum(-1)
    return columns * variance_divergence(var / prior_var, (var - prior_var) / prior_var).sum(-1) + shift
