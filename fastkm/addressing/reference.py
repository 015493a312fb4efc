"""The specification in plain PyTorch: factor the regularised Gram matrix once, then solve."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkm._runtime.status import NOT_POSITIVE_DEFINITE


class Address(NamedTuple):
    """A factored memory: everything needed to address it again and again."""

    factor: Tensor  # [B, K, K], lower Cholesky factor of the matrix that is solved with
    gram: Tensor | None  # [B, K, K], only for the squared-Gram solve
    info: Tensor  # [B], int32


def factor_addressing(mean: Tensor, ridge: Tensor, squared_gram: bool) -> Address:
    gram = mean @ mean.mT  # G [B, K, K]
    matrix = (gram @ gram if squared_gram else gram) + torch.diag_embed(ridge.unsqueeze(-1).expand(mean.shape[:2]))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    bad = (failed != 0) | ~factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    return Address(factor, gram if squared_gram else None, (NOT_POSITIVE_DEFINITE * bad.int()).int())


def solve_with(address: Address, mean: Tensor, queries: Tensor) -> Tensor:
    """Weights [B, Q, K] of queries [B, Q, C]."""
    target = mean @ queries.mT  # R z [B, K, Q]
    if address.gram is not None:
        target = address.gram @ target
    return torch.cholesky_solve(target, address.factor).mT


def solve_addressing(mean: Tensor, queries: Tensor, ridge: Tensor, squared_gram: bool) -> tuple[Tensor, Tensor]:
    address = factor_addressing(mean, ridge, squared_gram)
    return solve_with(address, mean, queries), address.info


def factor_ridge(mean: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """The operator ``factor_addressing``: the lower factor of the ridge solve, and its status."""
    address = factor_addressing(mean, ridge, squared_gram=False)
    return address.factor, address.info


def solve_factored(mean: Tensor, factor: Tensor, queries: Tensor) -> Tensor:
    """The operator of the same name: weights [B, Q, K] of queries from the factor of ``factor_ridge``."""
    return torch.cholesky_solve(mean @ queries.mT, factor).mT
