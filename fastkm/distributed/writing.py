"""Writing memories whose columns are split over ranks."""

import torch
from torch import Tensor

from fastkm._linalg.reference import clear_rows, variance_divergence
from fastkm._runtime.autocast import in_float32
from fastkm.distributed.gram import Gram, SquareRoot, holds_digits
from fastkm.distributed.ranks import Group, Ranks, Share
from fastkm.distributed.shares import GRADIENT, checked, finite
from fastkm.posterior import update_posterior
from fastkm.state import MemoryState
from fastkm.writing import WriteResult, write
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

        G = Σ_ranks Y_r Y_rᵀ = F Fᵀ        one all-reduce of (K + T)² numbers a memory
        write a memory of K + T columns with the mean F_R and the values F_Z: the same weights, covariance and KL
        R_r' = the posterior mean of rank r's own columns, given these weights

    Args:
        state: mean: the columns of this rank, any number of them, also other numbers on other ranks. cov: the whole,
            the same on every rank.
        values: the same columns of the patterns.
        noise_var, ridge, num_opt_iters, mask: as in :func:`fastkm.write`, the same on every rank.
        group: a process group, a :class:`torch.distributed.device_mesh.DeviceMesh` of one dimension, or None for all
            processes. Every rank of it must call.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None, for the small memory and for the columns.

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
        gram = finite(Gram.apply(*rows), "state.mean or values")
        facts = {
            "B": mean.shape[0],
            "K": mean.shape[1],
            "T": values_.shape[1],
            "num_opt_iters": count,
            GRADIENT: gram.requires_grad,
        }
        facts |= {"noise_var": noise, "ridge": ridges, "mask": mask_, "state.cov": cov}
        return Share(facts, mean.dtype, mean.shape[2], (rows, gram, cov, noise, ridges, mask_))

    rows, gram, cov, noise, ridges, mask = ranks.attempt(share)
    K, dtype = cov.shape[1], cov.dtype
    root, wide = _root_of_all(ranks, rows, gram, ridges, mask)
    root, small_noise, small_ridge, small_cov = (x.to(wide) for x in (root, noise, ridges, cov))
    small = MemoryState(root[:, :K].contiguous(), small_cov)
    codes = root[:, K:].contiguous()
    made = write(small, codes, small_noise, small_ridge, num_opt_iters=num_opt_iters, mask=mask, backend=backend)
    kl = made.kl + _kl_of_columns(sum(ranks.columns) - root.shape[2], small_noise, made.innovation_var)
    alike = made.weights, made.innovation_var, kl, made.state.cov
    weights, innovation_var, kl, new_cov = (x.to(dtype) for x in alike)
    own = update_posterior(MemoryState(rows[0], cov), weights, rows[1], noise, mask=mask, backend=backend)
    return WriteResult(MemoryState(own.state.mean, new_cov), weights, innovation_var, kl)


def _root_of_all(
    ranks: Ranks, rows: tuple[Tensor, Tensor], gram: Tensor, ridge: Tensor, mask: Tensor | None
) -> tuple[Tensor, torch.dtype]:
    """The square root of the inner products of all columns, and the dtype that holds these."""
    (gram,) = ranks.sum(gram)
    rank = min(gram.shape[1], sum(ranks.columns))
    unread = None if mask is None else torch.nn.functional.pad(~mask, (rows[0].shape[1], 0))
    root, pivots = SquareRoot.apply(gram, rank, unread)
    if gram.dtype == torch.float64 or holds_digits(gram, pivots, ridge):
        return root, gram.dtype
    (gram,) = ranks.sum(Gram.apply(*(x.double() for x in rows)))
    root, _ = SquareRoot.apply(gram, rank, unread)
    return root, gram.dtype


def _kl_of_columns(columns: int, noise_var: Tensor, innovation_var: Tensor) -> Tensor:
    """What ``columns`` of zeros add to the KL of each pattern: the small memory has fewer than all ranks hold."""
    explained = (innovation_var - noise_var).clamp_min(0)
    return 0.5 * columns * variance_divergence(noise_var / innovation_var, -explained / innovation_var)
