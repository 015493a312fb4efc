"""Reading memories whose columns are split over ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkm._linalg.reference import factor_status
from fastkm._runtime import guards, status
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.results import result
from fastkm.addressing.api import FACTOR_ADDRESSING
from fastkm.distributed.gram import Gram, holds_digits
from fastkm.distributed.ranks import Group, Ranks, Share
from fastkm.distributed.shares import GRADIENT, checked, finite, finite_gram, with_ridge
from fastkm.reading import ReadResult
from fastkm.reading.api import READ
from fastkm.reading.reference import iterate

__all__ = ["ShardedFactor", "factor_sharded", "read_factored_sharded", "read_sharded"]


@in_float32
def read_sharded(
    mean: Tensor,  # [B, K, this rank's columns]
    queries: Tensor,  # [B, Q, this rank's columns]
    ridge: float | Tensor,  # float, 0-d or [B]
    *,
    num_iters: int = 1,
    group: Group = None,
    backend: str | None = None,
) -> ReadResult:
    """:func:`fastkm.read` of memories whose columns are split over ranks.

    ``A = Σ_ranks R_r R_rᵀ + λI`` and ``x = Σ_ranks R_r z_r`` take one all-reduce of ``K² + KQ`` numbers a memory. Then
    each rank solves for the same weights, and decodes its own columns ``R_rᵀ w``.

    Args:
        mean: the columns of this rank, any number of them.
        queries: the same columns of the cues.
        ridge, num_iters: as in :func:`fastkm.read`, the same on every rank.
        group: as in :func:`write_sharded`.
        backend: as in :func:`fastkm.read`, by which it is refused or not. The products and the solve are PyTorch's.

    Returns:
        :class:`fastkm.ReadResult`: ``values`` have the columns of this rank; ``weights`` are the same on every rank.

    Numerics, gradients and errors: as :func:`write_sharded`.

    Source: Wu et al., NeurIPS 2018, section 3.2, with the identity as codec.
    """
    ranks = Ranks("read_sharded", group)

    def share() -> Share:
        mean_, queries_, ridges, count, *_ = checked(READ, backend, (mean, queries, ridge, num_iters, "ridge", "ieee"))
        queries_ = queries_.to(mean_.dtype)
        products = gram, addressed = _products(mean_, queries_)
        finite_gram(gram, "mean"), finite(addressed, "queries")
        facts = {"B": mean_.shape[0], "K": mean_.shape[1], "Q": queries_.shape[1], "num_iters": count, "ridge": ridges}
        facts[GRADIENT] = products[0].requires_grad or products[1].requires_grad
        return Share(facts, mean_.dtype, mean_.shape[2], (mean_, queries_, ridges, count, products))

    mean, queries, ridges, count, products = ranks.attempt(share)
    solver, (addressed,) = _solver_of_all(ranks, (mean, queries), products, ridges)
    weights = iterate(torch.cholesky_solve(addressed, solver.lower), solver.ridge, solver.lower, count)
    weights = weights.mT.to(mean.dtype)
    return ReadResult(weights @ mean, weights)


@result
class ShardedFactor(NamedTuple):
    """What reads of a memory need that is split by columns, computed once by :func:`factor_sharded`.

    ``lower`` is float64 beside a float32 memory whose system float32 does not hold.
    """

    mean: Tensor  # [B, K, this rank's columns], R
    ridge: Tensor  # [B], λ
    lower: Tensor  # [B, K, K], L with L Lᵀ = R Rᵀ + λI, the same on every rank
    pseudoinverse: Tensor  # [B, this rank's columns, K], Rᵀ (R Rᵀ + λI)⁻¹


@in_float32
def factor_sharded(
    mean: Tensor,  # [B, K, this rank's columns]
    ridge: float | Tensor,  # float, 0-d or [B]
    *,
    group: Group = None,
) -> ShardedFactor:
    """Compute once what reads need of memories whose columns are split over ranks: one all-reduce of ``K²`` numbers.

    Args:
        mean: the columns of this rank, any number of them. The factor is of the memory as it is now.
        ridge: λ, the same on every rank.
        group: as in :func:`write_sharded`.

    Returns:
        :class:`ShardedFactor`, for :func:`read_factored_sharded` in the same group. Gradients go through it.

    Errors: as :func:`write_sharded`.

    Source: Wu et al., NeurIPS 2018, eq. 8.
    """
    ranks = Ranks("factor_sharded", group)

    def share() -> Share:
        mean_, ridges, _ = checked(FACTOR_ADDRESSING, None, (mean, ridge, "ridge"))
        gram = finite_gram(_products(mean_)[0], "mean")
        facts = {"B": mean_.shape[0], "K": mean_.shape[1], "ridge": ridges, GRADIENT: gram.requires_grad}
        return Share(facts, mean_.dtype, mean_.shape[2], (mean_, ridges, (gram,)))

    mean, ridges, products = ranks.attempt(share)
    solver, _ = _solver_of_all(ranks, (mean,), products, ridges)
    pseudoinverse = torch.cholesky_solve(mean.to(solver.lower.dtype), solver.lower).mT
    return ShardedFactor(mean.clone(), solver.ridge, solver.lower, pseudoinverse.to(mean.dtype))


@in_float32
def read_factored_sharded(
    factor: ShardedFactor,
    queries: Tensor,  # [B, Q, this rank's columns]
    *,
    num_iters: int = 1,
    group: Group = None,
) -> ReadResult:
    """:func:`read_sharded` without its factorisation: one all-reduce of ``KQ`` numbers a memory.

    ``w₁ = Σ_ranks z_r R_r⁺``, ``w_{i+1} = w_i − λ A⁻¹ w_i``, and each rank decodes its own columns ``R_rᵀ w_n``.

    Args:
        factor: of :func:`factor_sharded`, by the same ranks.
        queries: the columns of this rank.
        num_iters: as in :func:`fastkm.read`.
        group: the group that the factor was made in.

    Returns:
        :class:`fastkm.ReadResult`: ``values`` have the columns of this rank; ``weights`` are the same on every rank.

    Gradients and errors: as :func:`write_sharded`.
    """
    ranks = Ranks("read_factored_sharded", group)

    def share() -> Share:
        signature = guards.Signature()
        mean = _checked_factor(signature, factor)
        queries_ = signature.tensor("queries", queries, "BQC", low_precision=True).to(mean.dtype)
        weights = finite(queries_ @ factor.pseudoinverse, "queries")
        facts = {"B": mean.shape[0], "K": mean.shape[1], "Q": queries_.shape[1]}
        facts["num_iters"], facts[GRADIENT] = guards.count("num_iters", num_iters), weights.requires_grad
        alike = {"factor.ridge": factor.ridge, "factor.lower": factor.lower}
        return Share({**facts, **alike}, mean.dtype, mean.shape[2], weights)

    (weights,) = ranks.sum(ranks.attempt(share))
    mean, ridge, lower, _ = factor
    weights = iterate(weights.mT.to(lower.dtype), ridge, lower, num_iters).mT.to(mean.dtype)
    return ReadResult(weights @ mean, weights)


def _checked_factor(signature: guards.Signature, factor: ShardedFactor) -> Tensor:
    """The mean of a factor whose parts fit each other."""
    if not isinstance(factor, ShardedFactor):
        raise TypeError(f"factor must be a ShardedFactor, as factor_sharded returns it, got {type(factor).__name__}")
    mean = signature.tensor("factor.mean", factor.mean, "BKC")
    signature.tensor("factor.pseudoinverse", factor.pseudoinverse, "BCK")
    solver = guards.Signature()  # of one dtype, which may be float64 beside float32
    solver.sizes = signature.sizes
    lower = solver.tensor("factor.lower", factor.lower, "BKK")
    solver.tensor("factor.ridge", factor.ridge, "B")
    if lower.dtype not in (mean.dtype, torch.float64):
        raise TypeError(f"factor.lower must be float64 like factor.mean, got {guards.dtype_name(lower.dtype)}")
    if lower.device != mean.device:
        raise ValueError(f"factor.lower must be on {mean.device} like factor.mean, got {lower.device}")
    return mean


def _products(mean: Tensor, *queries: Tensor) -> tuple[Tensor, ...]:
    """A rank's part of ``R Rᵀ [B, K, K]``, and of ``R z [B, K, Q]`` of each of the ``queries``."""
    return Gram.apply(mean, mean[:, :0]), *(mean @ x.mT for x in queries)


class Solver(NamedTuple):
    """``L Lᵀ = R Rᵀ + λI``, in the dtype that holds it."""

    lower: Tensor  # [B, K, K]
    ridge: Tensor  # [B]


def _solver_of_all(
    ranks: Ranks, rows: tuple[Tensor, ...], products: tuple[Tensor, ...], ridge: Tensor
) -> tuple[Solver, list[Tensor]]:
    """What solves with all columns, and the other ``products`` summed. ``rows`` are what the products were made of."""
    gram, *others = ranks.sum(*products)
    lower, info = torch.linalg.cholesky_ex(with_ridge(gram, ridge))
    pivots = lower.detach().diagonal(dim1=-2, dim2=-1).square() - ridge.detach().unsqueeze(-1)
    if gram.dtype == torch.float32 and (info.any() or not holds_digits(gram, pivots, ridge)):
        gram, *others = ranks.sum(*_products(*(x.double() for x in rows)))
        ridge = ridge.double()
        lower, info = torch.linalg.cholesky_ex(with_ridge(gram, ridge))
    status.raise_failures(factor_status(lower, info), "mean meanᵀ + ridge I")
    return Solver(lower, ridge), others
