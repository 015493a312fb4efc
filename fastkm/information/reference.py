"""The information form in plain PyTorch, float64: it is made of products and Cholesky factors of large matrices.

PyTorch's own libraries compute these at the speed of the machine, so there are no other backends.
"""

import torch
from torch import Tensor

from fastkm._linalg.reference import clear_masked, factor_status

# For each row of a memory, the roundings by which two computations of a covariance may differ.
ROUNDINGS = 32
# Of an eigenvalue that is 1 for what was not written to. With more, a direction that looks untouched may have been
# written to by weak patterns, which move the mean by the square root of what they take from the eigenvalue. Float32 has
# more always, so the mean is looked at in float64 alone.
MOST_ROUNDING = 1e-6
# How far a mean may be from its prior's in such directions, as a share of both: patterns that hardly reach a direction
# move it too.
MOST_MOVED = 0.1


def to_information(mean, cov):
    """Λ = U⁻¹ and η = Λ R, and the status of each memory."""
    factor, failed = torch.linalg.cholesky_ex((cov + cov.mT) / 2)
    precision = torch.cholesky_inverse(factor)
    return (precision + precision.mT) / 2, torch.cholesky_solve(mean, factor), factor_status(factor, failed)


def from_information(precision, information):
    """R = Λ⁻¹ η and U = Λ⁻¹, and the status of each memory: the same map, its own inverse."""
    cov, mean, info = to_information(information, precision)
    return mean, cov, info


def update_information(precision, information, weights, values, noise_var, mask):
    """Λ + Wᵀ diag(σ²)⁻¹ W and η + Wᵀ diag(σ²)⁻¹ Z."""
    weights, values = clear_masked(weights, values, mask)
    scale = noise_var.rsqrt().unsqueeze(-1)
    weights, values = scale * weights, scale * values  # the product of a matrix with itself is symmetric
    return precision + weights.mT @ weights, information + weights.mT @ values


def merge(forms, prior):
    """Λ = Λ_0 + Σ (Λ_i − Λ_0), and η likewise."""
    precision, information = prior
    for learnt_precision, learnt in forms:
        precision, information = precision + (learnt_precision - prior[0]), information + (learnt - prior[1])
    return precision, information


def differs_from_prior(mean, cov, prior_mean, prior_cov) -> tuple[Tensor, Tensor]:
    """Where [B] a memory cannot come from a prior: it is wider than the prior, or it moved where it learnt nothing.

    With ``U_0 = L Lᵀ``, the eigenvalues of ``L⁻¹ U L⁻ᵀ`` are at most 1 for a memory that was written from the prior,
    and ``L⁻¹ (R − R_0)`` lies in the span of the eigenvectors whose eigenvalue is less than 1. Rounding of ``U`` moves
    an eigenvalue by its size times ``‖L⁻¹‖²``, in the 2-norm.
    """
    rounding = ROUNDINGS * max(cov.shape[-1], 1) * torch.finfo(cov.dtype).eps
    mean, cov, prior_mean, prior_cov = (x.double() for x in (mean, cov, prior_mean, prior_cov))
    if not mean.numel():
        nowhere = torch.zeros(cov.shape[:1], dtype=torch.bool, device=cov.device)
        return nowhere, nowhere
    factor = torch.linalg.cholesky((prior_cov + prior_cov.mT) / 2)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(cov.shape[-1]).to(factor).expand_as(cov), upper=False)
    whitened = inverse @ cov @ inverse.mT
    kept, directions = torch.linalg.eigh((whitened + whitened.mT) / 2)
    spread = prior_cov.diagonal(dim1=-2, dim2=-1).amax(-1) * torch.linalg.eigvalsh(inverse @ inverse.mT)[..., -1]
    tolerance = (rounding * spread.clamp_min(1)).unsqueeze(-1)
    mean, prior_mean = inverse @ mean, inverse @ prior_mean
    moved = (directions.mT @ (mean - prior_mean)).norm(dim=-1)  # [B, K]
    untouched = (kept >= 1 - tolerance) & (tolerance < MOST_ROUNDING)
    far = moved.masked_fill(~untouched, 0).norm(dim=-1) > MOST_MOVED * (
        mean.norm(dim=(-2, -1)) + prior_mean.norm(dim=(-2, -1))
    )
    return (kept > 1 + tolerance).any(-1), far
