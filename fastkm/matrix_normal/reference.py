"""The specification in plain PyTorch: Kullback-Leibler divergences and log-determinants by Cholesky."""

import torch
from torch import Tensor

from fastkm._linalg.reference import first_failure, symmetry
from fastkm._runtime.status import NOT_POSITIVE_DEFINITE


def kl_weights(weights, weight_var, prior_var):
    """KL(N(w, σw² I) ‖ N(0, σ0² I)) over the last axis of ``weights``."""
    ratio = torch.as_tensor(weight_var, dtype=weights.dtype, device=weights.device) / prior_var
    return 0.5 * (weights.square().sum(-1) / prior_var + weights.shape[-1] * (ratio - 1 - ratio.log()))


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
    """½ [C tr(U0⁻¹U) + tr(ΔᵀU0⁻¹Δ) − KC + C (ln|U0| − ln|U|)], both traces as squared norms of triangular solves."""
    (_, rows, columns) = mean.shape
    factor, info = factor_covariance(cov)
    prior_factor, prior_info = factor_covariance(prior_cov)
    spread = torch.linalg.solve_triangular(prior_factor, factor, upper=False).square().sum((-2, -1))
    shift = torch.linalg.solve_triangular(prior_factor, mean - prior_mean, upper=False).square().sum((-2, -1))
    growth = log_det_of_factor(prior_factor) - log_det_of_factor(factor)
    return 0.5 * (columns * (spread - rows + growth) + shift), torch.maximum(info, prior_info)


def kl_memory_deepmind(mean, cov, prior_mean, prior_cov):
    """The released code's formula: diagonals only, and without the factor ½."""
    columns = mean.shape[-1]
    var, prior_var = cov.diagonal(dim1=-2, dim2=-1), prior_cov.diagonal(dim1=-2, dim2=-1)  # [B, K]
    shift = ((mean - prior_mean).square().sum(-1) / prior_var).sum(-1)
    return columns * (var / prior_var - 1 + prior_var.log() - var.log()).sum(-1) + shift
