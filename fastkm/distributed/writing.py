"""Writing memories whose columns are split over ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkm._linalg.reference import clear_rows, variance_divergence
from fastkm._runtime import dispatch, status
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.autograd import wants_gradient
from fastkm.distributed.gram import Gram, SquareRoot, holds_digits
from fastkm.distributed.ranks import Group, Ranks, Share
from fastkm.distributed.shares import GRADIENT, checked, finite_gram
from fastkm.posterior import update_posterior
from fastkm.state import MemoryState
from fastkm.writing import WriteResult, native, write
from fastkm.writing.api import WRITE

__all__ = ["write_sharded"]


@in_float32
def write_sharded(
    state: MemoryState,  # mean [B, K, this rank's columns], cov [B, K, K]
    values: Tensor,  # [B, T, this rank's columns]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, T]
    ridge: float | Tensor,  # float, 0-d or [B]
    *,
    num_opt_iters: int = 1,
    mask: Tensor | None = None,  # [B, T], bool
    group: Group = None,
    backend: str | None = None,
) -> WriteResult:
    """:func:`fastkm.write` of memories whose columns are split over ranks: each rank holds its own columns of R and Z.

    The weights depend on the columns only through the inner products of the rows of ``Y = [R; Z]``::

        G = Σ_ranks Y_r Y_rᵀ        one all-reduce of (K + T)² numbers a memory
        the weights, the covariance, the variances and the KL from G: the same on every rank
        R_r' = the posterior mean of rank r's own columns, given these weights

    Args:
        state: mean: the columns of this rank, any number of them, also other numbers on other ranks. cov: the whole,
            the same on every rank.
        values: the same columns of the patterns.
        noise_var, ridge, num_opt_iters, mask: as in :func:`fastkm.write`, the same on every rank.
        group: a process group, a :class:`torch.distributed.device_mesh.DeviceMesh` of one dimension, or None for all
            processes. Every rank of it must call.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None, for the search and for the columns.

    Returns:
        :class:`fastkm.WriteResult`. ``state.mean`` has the columns of this rank. All else is the same on every rank,
        bit by bit if the ranks are machines of one kind.

    Numerics: as :func:`fastkm.write`, with the rounding of one all-reduce more. Where float32 inner products would not
    hold the system, every rank computes and sums them again in float64, which costs a second all-reduce.
    What gradients differentiate is the sum of the losses of all ranks: a loss that every rank computes alike is to be
    counted once, not on each rank. The gradient of what every rank holds (cov, noise_var, ridge) is to be summed over
    the ranks. There are no second derivatives. Headers are read in Python, so ``torch.compile`` breaks its graph here.

    What is wrong on one rank is raised on every rank.

    Raises:
        TypeError, ValueError, fastkm.BackendUnavailableError: the arguments of some rank are refused, named with the
            rank; or ranks disagree about B, T, K, the dtype or what must be the same.
        torch.linalg.LinAlgError: as :func:`fastkm.write`.
        RuntimeError: no process group; a rank that has died, at the latest after the timeout of the group.

    Source: Wu et al., NeurIPS 2018, algorithm 1, in the inner products of its rows.
    """
    ranks = Ranks("write_sharded", group)

    def share() -> Share:
        mean, cov, values_, noise, ridges, count, _, mask_, _ = checked(
            WRITE, backend, (state, values, noise_var, ridge, num_opt_iters, "ridge", mask, "ieee")
        )
        rows = mean, clear_rows(values_.to(mean.dtype), mask_)
        gram = finite_gram(Gram.apply(*rows), "state.mean or values")
        facts = {
            "B": mean.shape[0],
            "K": mean.shape[1],
            "T": values_.shape[1],
            "num_opt_iters": count,
            GRADIENT: gram.requires_grad,
        }
        facts |= {"noise_var": noise, "ridge": ridges, "mask": mask_, "state.cov": cov}
        return Share(facts, mean.dtype, mean.shape[2], Work(rows, gram, cov, noise, ridges, mask_, count))

    made = ranks.attempt(share)
    found = (
        _found_by_kernel(ranks, made) if _has_kernel(made, backend) else _found_by_small_memory(ranks, made, backend)
    )
    (mean, rows), dtype = made.rows, made.cov.dtype
    weights, innovation_var, kl, cov = (x.to(dtype) for x in found)
    own = update_posterior(MemoryState(mean, made.cov), weights, rows, made.noise_var, mask=made.mask, backend=backend)
    return WriteResult(MemoryState(own.state.mean, cov), weights, innovation_var, kl)


class Work(NamedTuple):
    """What a rank brings to a write."""

    rows: tuple[Tensor, Tensor]  # R [B, K, this rank's columns] and Z [B, T, this rank's columns]
    gram: Tensor  # [B, K + T, K + T], of its columns
    cov: Tensor
    noise_var: Tensor  # [B, T]
    ridge: Tensor  # [B]
    mask: Tensor | None
    num_opt_iters: int

    def unread(self) -> Tensor | None:
        """Which rows of Y are masked patterns [B, K + T]."""
        return None if self.mask is None else torch.nn.functional.pad(~self.mask, (self.cov.shape[1], 0))


class Found(NamedTuple):
    """What every rank finds alike."""

    weights: Tensor  # [B, T, K]
    innovation_var: Tensor  # [B, T]
    kl: Tensor  # [B, T]
    cov: Tensor  # [B, K, K]


def _has_kernel(work: Work, backend: str | None) -> bool:
    """Whether the operator ``write_gram`` computes this call. It has no gradient, and none for a GPU."""
    if wants_gradient((*work.rows, *work)) or not work.gram.is_cpu:
        return False
    return dispatch.resolve("write", backend, work.rows[0], work.cov, work.rows[1]) == "native"


def _found_by_kernel(ranks: Ranks, work: Work) -> Found:
    (gram,) = ranks.sum(work.gram)
    cov, weights, innovation_var, kl, pivots, info = _write_gram(ranks, work, gram)
    without_ridge = pivots - work.ridge.unsqueeze(-1)
    if gram.dtype != torch.float64 and not holds_digits(gram, without_ridge, work.ridge):
        (gram,) = ranks.sum(Gram.apply(*(x.double() for x in work.rows)))
        cov, weights, innovation_var, kl, _, info = _write_gram(ranks, work, gram)
    status.raise_failures(info, "state.cov")
    return Found(weights, innovation_var, kl, cov)


def _write_gram(ranks: Ranks, work: Work, gram: Tensor) -> tuple[Tensor, ...]:
    given = (x.to(gram.dtype) for x in (work.cov, work.noise_var, work.ridge))
    return native.write_gram(gram, *given, sum(ranks.columns), work.num_opt_iters, work.mask)


def _found_by_small_memory(ranks: Ranks, work: Work, backend: str | None) -> Found:
    """By a write of the memory of K + T columns, on any backend and with its gradient."""
    root, wide = _root_of_all(ranks, work)
    K = work.cov.shape[1]
    noise_var, ridge, cov = (x.to(wide) for x in (work.noise_var, work.ridge, work.cov))
    small, codes = MemoryState(root[:, :K].to(wide).contiguous(), cov), root[:, K:].to(wide).contiguous()
    count = work.num_opt_iters
    made = write(small, codes, noise_var, ridge, num_opt_iters=count, mask=work.mask, backend=backend)
    kl = made.kl + _kl_of_columns(sum(ranks.columns) - root.shape[2], noise_var, made.innovation_var)
    return Found(made.weights, made.innovation_var, kl, made.state.cov)


def _root_of_all(ranks: Ranks, work: Work) -> tuple[Tensor, torch.dtype]:
    """The square root of the inner products of all columns, and the dtype that holds these."""
    (gram,) = ranks.sum(work.gram)
    rank = min(gram.shape[1], sum(ranks.columns))
    root, pivots = SquareRoot.apply(gram, rank, work.unread())
    if gram.dtype == torch.float64 or holds_digits(gram, pivots, work.ridge):
        return root, gram.dtype
    (gram,) = ranks.sum(Gram.apply(*(x.double() for x in work.rows)))
    root, _ = SquareRoot.apply(gram, rank, work.unread())
    return root, gram.dtype


def _kl_of_columns(columns: int, noise_var: Tensor, innovation_var: Tensor) -> Tensor:
    """What ``columns`` of zeros add to the KL of each pattern: the small memory has fewer than all ranks hold."""
    explained = (innovation_var - noise_var).clamp_min(0)
    return 0.5 * columns * variance_divergence(noise_var / innovation_var, -explained / innovation_var)
