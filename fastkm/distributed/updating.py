"""Conditioning on patterns with given weights, where columns or patterns are split over ranks."""

import torch
from torch import Tensor

from fastkm._linalg.reference import clear_masked, factor_status, first_failure, symmetry
from fastkm._runtime import status
from fastkm._runtime.autocast import in_float32
from fastkm.distributed.ranks import Group, Ranks, Share
from fastkm.distributed.shares import GRADIENT, checked, finite, with_ridge
from fastkm.filtering import FilterResult, filter_posterior
from fastkm.filtering.api import FILTER_POSTERIOR
from fastkm.posterior import PosteriorUpdate, update_posterior
from fastkm.posterior.api import UPDATE_POSTERIOR
from fastkm.state import MemoryState

__all__ = ["filter_sharded", "update_pooled", "update_sharded"]


@in_float32
def update_sharded(
    state: MemoryState,  # mean [B, K, this rank's columns], cov [B, K, K]
    weights: Tensor,  # [B, T, K]
    values: Tensor,  # [B, T, this rank's columns]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, T]
    *,
    mask: Tensor | None = None,  # [B, T], bool
    group: Group = None,
    backend: str | None = None,
) -> PosteriorUpdate:
    """:func:`fastkm.update_posterior` of memories whose columns are split over ranks.

    The covariance does not depend on the columns, and a column's mean on no other column. So each rank updates its own
    columns. KL and evidence are sums over columns: one all-reduce of ``T + 1`` numbers a memory.

    Args:
        state: mean: the columns of this rank. cov: the whole, the same on every rank.
        weights, noise_var, mask: as in :func:`fastkm.update_posterior`, the same on every rank.
        values: the columns of this rank.
        group: as in :func:`write_sharded`.
        backend: as in :func:`fastkm.update_posterior`.

    Returns:
        :class:`fastkm.PosteriorUpdate`; ``state.mean`` has the columns of this rank, all else is the same on every
        rank.

    Gradients and errors: as :func:`write_sharded`.

    Source: Wu et al., NeurIPS 2018, eq. 6.
    """
    ranks = Ranks("update_sharded", group)

    def share() -> Share:
        arguments = (state, weights, values, noise_var, mask, "ieee")
        mean, cov, weights_, _, noise, mask_, _ = checked(UPDATE_POSTERIOR, backend, arguments)
        made = update_posterior(state, weights, values, noise_var, mask=mask, backend=backend)
        facts = {"B": mean.shape[0], "K": mean.shape[1], "T": weights_.shape[1], "noise_var": noise, "mask": mask_}
        return Share(
            facts | {"weights": weights_, "state.cov": cov, GRADIENT: made.kl.requires_grad},
            mean.dtype,
            mean.shape[2],
            made,
        )

    made = ranks.attempt(share)
    kl, log_evidence = ranks.sum(made.kl, made.log_evidence)
    return made._replace(kl=kl, log_evidence=log_evidence)


@in_float32
def filter_sharded(
    state: MemoryState,  # mean [B, K, this rank's columns], cov [B, K, K]
    weights: Tensor,  # [B, T, K]
    values: Tensor,  # [B, T, this rank's columns]
    queries: Tensor,  # [B, T, K]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, T]
    *,
    retention: float | Tensor | None = None,  # float, 0-d, [B] or [B, T]
    prior_var: float | Tensor = 1.0,  # float, 0-d or [B]
    forgetting: float | Tensor | None = None,  # float, 0-d, [B] or [B, T]
    read: str = "after",
    mask: Tensor | None = None,  # [B, T], bool
    group: Group = None,
    backend: str | None = None,
) -> FilterResult:
    """:func:`fastkm.filter_posterior` of memories whose columns are split over ranks.

    Weights and queries are weights over the rows, so that each rank filters its own columns of mean and values. The
    evidence is a sum over columns: one all-reduce of one number a memory.

    Args:
        state: mean: the columns of this rank. cov: the whole, the same on every rank.
        values: the columns of this rank.
        group: as in :func:`write_sharded`.
        backend: as in :func:`fastkm.filter_posterior`.
        All others: as in :func:`fastkm.filter_posterior`, the same on every rank.

    Returns:
        :class:`fastkm.FilterResult`; ``state.mean`` and ``values`` have the columns of this rank, all else is the same
        on every rank.

    Gradients and errors: as :func:`write_sharded`.
    """
    ranks = Ranks("filter_sharded", group)

    def share() -> Share:
        arguments = (state, weights, values, queries, noise_var, retention, prior_var, forgetting, read, mask, "ieee")
        mean, cov, weights_, _, queries_, noise, kept, prior, forgotten, before, mask_, _ = checked(
            FILTER_POSTERIOR, backend, arguments
        )
        made = filter_posterior(
            state,
            weights,
            values,
            queries,
            noise_var,
            retention=retention,
            prior_var=prior_var,
            forgetting=forgetting,
            read=read,
            mask=mask,
            backend=backend,
        )
        facts = {"B": mean.shape[0], "K": mean.shape[1], "T": weights_.shape[1], "read": int(before)}
        facts |= {"noise_var": noise, "retention": kept, "prior_var": prior, "forgetting": forgotten, "mask": mask_}
        facts |= {"weights": weights_, "queries": queries_, "state.cov": cov, GRADIENT: made.log_evidence.requires_grad}
        return Share(facts, mean.dtype, mean.shape[2], made)

    made = ranks.attempt(share)
    return made._replace(log_evidence=ranks.sum(made.log_evidence)[0])


@in_float32
def update_pooled(
    state: MemoryState,  # mean [B, K, C], cov [B, K, K]
    weights: Tensor,  # [B, this rank's patterns, K]
    values: Tensor,  # [B, this rank's patterns, C]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, this rank's patterns]
    *,
    mask: Tensor | None = None,  # [B, this rank's patterns], bool
    group: Group = None,
) -> MemoryState:
    """The memory after the patterns of all ranks, each of which has seen its own: data-parallel Bayesian regression.

    Sums over patterns commute, so that one all-reduce of ``K² + KC`` numbers a memory gives every rank the posterior::

        J = Σ_ranks Wᵀ diag(1/σ²) W        H = Σ_ranks Wᵀ diag(1/σ²) (Z − W R)
        U = S Sᵀ        U' = S (I + Sᵀ J S)⁻¹ Sᵀ        R' = R + U' H

    Args:
        state: the memory before, the same on every rank.
        weights, values, mask: the patterns of this rank, any number of them, none included.
        noise_var: of this rank's patterns; it may differ between ranks.
        group: as in :func:`write_sharded`.

    Returns:
        the memory after, the same on every rank. Which rank had which pattern does not matter.

    Numerics: sums and solve are float64 for a float32 memory too, because float32 sums lose digits in directions that
    no pattern has reached.

    Gradients and errors: as :func:`write_sharded`; there are second derivatives only within a rank.
    """
    ranks = Ranks("update_pooled", group)

    def share() -> Share:
        arguments = (state, weights, values, noise_var, mask, "ieee")
        mean, cov, weights_, values_, noise, mask_, _ = checked(UPDATE_POSTERIOR, "reference", arguments)
        w, z, wide = (x.double() for x in (*clear_masked(weights_, values_, mask_), mean))
        scaled = (w / noise.double().unsqueeze(-1)).mT
        sums = finite(scaled @ w, "weights"), finite(scaled @ (z - w @ wide), "values")
        facts = {"B": mean.shape[0], "K": mean.shape[1], "C": mean.shape[2], "state.mean": mean, "state.cov": cov}
        facts[GRADIENT] = any(x.requires_grad for x in sums)
        return Share(facts, mean.dtype, mean.shape[2], (mean, cov, sums))

    mean, cov, sums = ranks.attempt(share)
    precision, information = ranks.sum(*sums)
    factor, info = torch.linalg.cholesky_ex((cov.double() + cov.double().mT) / 2)
    status.raise_failures(first_failure(symmetry(cov), factor_status(factor, info)), "state.cov")
    inner = with_ridge(factor.mT @ precision @ factor, factor.new_ones(len(factor)))
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), factor.mT, upper=False)
    new_cov = half.mT @ half
    return MemoryState((mean.double() + new_cov @ information).to(mean.dtype), new_cov.to(mean.dtype))
