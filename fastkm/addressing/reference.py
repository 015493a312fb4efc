"""The specification in plain PyTorch: factor the regularised Gram matrix once, then solve."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkm._runtime.autograd import wants_gradient
from fastkm._runtime.status import NOT_POSITIVE_DEFINITE
from fastkm._runtime.torch_private import is_transformed


class Address(NamedTuple):
    """A factored memory: everything needed to address it again and again."""

    factor: Tensor  # [B, K, K], lower Cholesky factor of the matrix that is solved with
    gram: Tensor | None  # [B, K, K], only for the squared-Gram solve
    info: Tensor  # [B], int32


def factor_memory(mean: Tensor, ridge: Tensor, squared_gram: bool) -> Address:
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
    address = factor_memory(mean, ridge, squared_gram)
    return solve_with(address, mean, queries), address.info


def factor_addressing(mean: Tensor, ridge: Tensor, squared_gram: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rᵀ A⁻¹ or Rᵀ G A⁻¹, L, G or a matrix without rows, and the status."""
    address = factor_memory(mean, ridge, squared_gram)
    target, gram = mean, mean.new_empty(mean.shape[0], 0, mean.shape[1])
    if address.gram is not None:
        target, gram = address.gram @ mean, address.gram
    pseudoinverse = torch.cholesky_solve(target, address.factor).mT.contiguous()
    return pseudoinverse, address.factor, gram, address.info


def must_factor_again(mean: Tensor, ridge: Tensor) -> bool:
    """Whether PyTorch differentiates for the memory: a factor is known as a number, not as a function of it."""
    return wants_gradient((mean, ridge)) or is_transformed()


def solve_factored(mean, queries, ridge, lower, pseudoinverse, gram):
    if must_factor_again(mean, ridge):
        return solve_addressing(mean, queries, ridge, gram.shape[1] > 0)
    return queries @ pseudoinverse, mean.new_zeros(mean.shape[:1], dtype=torch.int32)
