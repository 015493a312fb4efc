"""Reading a stream: solves with the carried inverse, corrected by their residuals."""

import torch
from torch import Tensor

MOST_CORRECTIONS = 3


def read(mean: Tensor, inverse: Tensor, queries: Tensor, ridge: Tensor, num_iters: int) -> tuple[Tensor, bool]:
    """Weights ``[B, Q, K]`` of :func:`fastkm.read`, and whether the inverse served for all of them."""
    ridge = ridge.view(-1, 1, 1)
    size = mean.flatten(1).norm(dim=-1).view(-1, 1, 1)
    eps = torch.finfo(mean.dtype).eps
    target = queries @ mean.mT

    def residual_of_first(weights: Tensor) -> tuple[Tensor, Tensor]:
        """ρ = R (z − Rᵀw) − λw, and its rounding."""
        innovation = queries - weights @ mean
        scale = size * (2 * norm(queries) + norm(innovation)) + ridge * norm(weights)
        return innovation @ mean.mT - ridge * weights, eps * scale

    def residual_of_next(solved: Tensor) -> tuple[Tensor, Tensor]:
        """ρ = w − A v for v = A⁻¹ w, and its rounding."""
        values = solved @ mean
        scale = norm(weights) + size * norm(values) + ridge * norm(solved)
        return weights - (values @ mean.mT + ridge * solved), eps * scale

    weights, served = correct(inverse, target @ inverse, residual_of_first)
    for _ in range(num_iters - 1):
        solved, good = correct(inverse, weights @ inverse, residual_of_next)
        weights, served = weights - ridge * solved, served and good
    return weights, served


def correct(inverse: Tensor, weights: Tensor, residual_of) -> tuple[Tensor, bool]:
    for corrections in range(MOST_CORRECTIONS + 1):
        residual, rounding = residual_of(weights)
        reached = norm(residual) <= rounding
        if bool(reached.all()):
            return weights, True
        if corrections < MOST_CORRECTIONS:
            weights = torch.where(reached, weights, weights + residual @ inverse)
    return weights, not bool((~reached & residual.isfinite().all(-1, keepdim=True)).any())


def norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)
