"""Reading a stream: solves with the carried inverse, corrected by their residuals."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

MOST_CORRECTIONS = 4


def read(mean: Tensor, inverse: Tensor, queries: Tensor, ridge: Tensor, num_iters: int) -> tuple[Tensor, bool]:
    """Weights ``[B, Q, K]`` of :func:`fastkm.read`, and whether the inverse served for all of them."""
    ridge = ridge.view(-1, 1, 1)
    size = mean.flatten(1).norm(dim=-1).view(-1, 1, 1)
    eps = torch.finfo(mean.dtype).eps
    target = queries @ mean.mT

    def residual_of_first(weights: Tensor) -> tuple[Tensor, Tensor]:
        """ρ = R (z − Rᵀw) − λw, and its rounding."""
        innovation = queries - weights @ mean
        scale = size * (norm(queries) + size * norm(weights)) + ridge * norm(weights)
        return innovation @ mean.mT - ridge * weights, eps * scale

    def residual_of_next(solved: Tensor) -> tuple[Tensor, Tensor]:
        """ρ = w − A v for v = A⁻¹ w, and its rounding."""
        values = solved @ mean
        scale = norm(weights) + size.square() * norm(solved) + ridge * norm(solved)
        return weights - (values @ mean.mT + ridge * solved), eps * scale

    weights, served = correct(inverse, target @ inverse, residual_of_first)
    for _ in range(num_iters - 1):
        solved, good = correct(inverse, weights @ inverse, residual_of_next)
        weights, served = weights - ridge * solved, served and good
    return weights, served


def correct(inverse: Tensor, weights: Tensor, residual_of: Callable) -> tuple[Tensor, bool]:
    """``weights`` corrected by their residuals, as a pattern's are, and whether these became rounding."""
    least = torch.finfo(weights.dtype).eps * (2 + math.sqrt(weights.shape[-1]) / 4)
    last = torch.full_like(weights[..., :1], torch.inf)
    done = torch.zeros_like(last, dtype=torch.bool)
    for corrections in range(MOST_CORRECTIONS + 1):
        residual, rounding = residual_of(weights)
        reached = (norm(residual) <= rounding) | ~residual.isfinite().all(-1, keepdim=True)
        if corrections == MOST_CORRECTIONS:
            break
        correction = residual @ inverse
        error = norm(correction)
        done = done | (reached & ~(error > least * norm(weights))) | (reached & (2 * error > last))
        if bool(done.all()):
            break
        weights, last = torch.where(done, weights, weights + correction), error
    return weights, bool((reached | done).all())


def norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)
