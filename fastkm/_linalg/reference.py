"""What the reference forms of several families share: the status of covariances, and one divergence."""

import torch
from torch import Tensor

from fastkm._runtime.status import ASYMMETRIC, LOST, NOT_POSITIVE_DEFINITE, NOT_WRITTEN, UNTOLD

# A variance is lost when it is less than this many times the rounding of the sum that gives it.
LEAST_DIGITS = 16
# What a removal divides by has at least so many times the rounding of its sum: two digits.
LEAST_DIGITS_LEFT = 256


def symmetry(cov: Tensor) -> Tensor:
    """Status [B]: not finite, or further from symmetric than rounding explains."""
    tolerance = torch.finfo(cov.dtype).eps ** 0.5
    gap, scale = (cov - cov.mT).abs().flatten(1), _largest(cov.abs()).unsqueeze(-1)
    finite = cov.isfinite().flatten(1).all(-1)
    status = torch.where((gap > tolerance * scale).any(-1), ASYMMETRIC, 0)
    return torch.where(finite, status, NOT_POSITIVE_DEFINITE).int()


def clear_masked(weights: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The patterns, zero where they are masked: there they may hold anything, even NaN."""
    return clear_rows(weights, mask), clear_rows(values, mask)


def clear_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows.masked_fill(~mask.unsqueeze(-1), 0)


def factor_status(factor: Tensor, failed: Tensor) -> Tensor:
    """Status [B] of Cholesky factors: NOT_POSITIVE_DEFINITE where there is none."""
    bad = (failed != 0) | ~factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    return (NOT_POSITIVE_DEFINITE * bad.int()).int()


def variance_divergence(ratio: Tensor, excess: Tensor) -> Tensor:
    """``r − 1 − ln r ≥ 0``: twice the KL of two centred normal laws whose variances have the ratio ``r``.

    ``excess`` is ``r − 1``, which the caller knows with more digits than ``ratio`` holds. Near ``r = 1`` both terms
    cancel to ``(r − 1)² / 2``. Between ½ and 2 this is therefore summed, with ``u = (1 − r)/(1 + r)``, ``|u| ≤ 1/3``::

        r − 1 − ln r = 2 [u²/(1 + u) + u³ (1/3 + u²/5 + u⁴/7 + …)]

    N terms leave a relative error below ``|u|^(2N+1) / (2N + 3)``, and in the derivative below ``|u|^(2N+1)``; N = 7 in
    float32 and 16 in float64 bring both below the rounding of one operation. The result is never negative: for
    ``u ≥ 0`` no term is, and for ``u < 0`` the second is at most 0.13 of the first.
    """
    u = -excess / (1 + ratio)
    square = u * u
    series = torch.zeros_like(u)
    for n in range(16 if u.dtype == torch.float64 else 7, 0, -1):
        series = series * square + 1 / (2 * n + 1)
    near = 2 * square * (1 / (1 + u) + u * series)
    return torch.where((ratio >= 0.5) & (ratio <= 2), near, excess - ratio.log())


def variance_status(
    rows: int, noise_var: Tensor, variances: Tensor, explained: Tensor, scale: Tensor, failed: Tensor
) -> Tensor:
    """Status [B] of a chunk: whether its covariance can be positive definite, and whether the next one can be held.

    ``variances`` [B, t] are ``wᵀUw`` against the memory before the chunk, ``explained`` what the elimination leaves of
    them, ``scale`` ``Σ w_i² U_ii``; a memory has ``rows`` rows. A positive definite covariance explains nothing
    negative. Along a pattern, ``wᵀUw`` becomes ``wᵀUw σ²/s``; both are sums of ``w_i w_j U_ij``, whose rounding is of
    the size ``eps Σ w_i² U_ii``. Below a few times that size nothing is left of the variance but rounding, and the
    covariance need not be positive definite.
    """
    eps = torch.finfo(variances.dtype).eps
    noise_var, variances, explained = noise_var.detach(), variances.detach(), explained.detach()
    rounding = 4 * (rows + explained.shape[-1]) * eps * (variances + noise_var).abs()
    indefinite = (failed != 0) | ~(explained >= -rounding).all(-1)
    explained = explained.clamp_min(0)
    left = explained * (noise_var / (explained + noise_var))
    lost = ~(left >= LEAST_DIGITS * eps * scale).all(-1)
    return first_failure(NOT_POSITIVE_DEFINITE * indefinite.int(), LOST * lost.int()).int()


def removal_status(rows: int, noise_var: Tensor, factor: Tensor, scale: Tensor, failed: Tensor) -> Tensor:
    """Status [B] of a chunk that is removed: whether it was in there, and whether enough digits say so.

    ``factor`` [B, t, t] is that of ``S = diag σ² − W U Wᵀ``. What all patterns leave of the noise of one is
    ``1/(S⁻¹)_tt``, and its digits are those of the covariance without the patterns. It is a difference from σ² of a
    sum, whose rounding is ``eps scale``, ``scale = Σ w_i² U_ii``; and what was written into a memory rounded as the
    wider memory before it did, which is ``σ² (S⁻¹)_tt`` times as wide.
    """
    factor, noise_var, scale = factor.detach(), noise_var.detach(), scale.detach()
    eye = torch.eye(factor.shape[-1]).to(factor).expand_as(factor)
    inverse_variance = torch.linalg.solve_triangular(factor, eye, upper=False).square().sum(-2)  # (S⁻¹)_tt [B, t]
    rounding, size = torch.finfo(factor.dtype).eps, scale.abs() + noise_var
    explained_less = factor.diagonal(dim1=-2, dim2=-1).square() - noise_var  # −wᵀUw
    indefinite = (explained_less > 4 * (rows + factor.shape[-1]) * rounding * size).any(-1)
    least = LEAST_DIGITS_LEFT * rounding
    told = (least * size * inverse_variance <= 1) & (least * (noise_var * inverse_variance).square() <= 1)
    status = first_failure(NOT_WRITTEN * (failed != 0).int(), NOT_POSITIVE_DEFINITE * indefinite.int())
    return first_failure(status, UNTOLD * (~told.all(-1)).int()).int()


def first_failure(status: Tensor, later: Tensor) -> Tensor:
    """``later`` where ``status`` is good."""
    return torch.where(status != 0, status, later)


def _largest(x: Tensor) -> Tensor:
    """Largest entry of each matrix [B]; 0 for an empty one."""
    return x.flatten(1).max(-1).values if x.shape[1:].numel() else x.new_zeros(x.shape[0])
