"""Operations on memories whose columns, or whose patterns, are split over the ranks of a process group."""

import torch
from torch import Tensor

from fastkm._linalg.reference import variance_divergence
from fastkm._runtime import dispatch, status
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.operation import Operation
from fastkm.distributed.gram import Gram, SquareRoot, holds_digits
from fastkm.distributed.ranks import Group, Ranks, Share
from fastkm.filtering import FilterResult, filter_posterior
from fastkm.filtering.api import FILTER_POSTERIOR
from fastkm.posterior import PosteriorUpdate, update_posterior
from fastkm.posterior.api import UPDATE_POSTERIOR
from fastkm.reading import ReadResult
from fastkm.reading.api import READ
from fastkm.reading.reference import iterate
from fastkm.state import MemoryState
from fastkm.writing import WriteResult, write
from fastkm.writing.api import WRITE

__all__ = ["filter_sharded", "read_sharded", "update_pooled", "update_sharded", "write_sharded"]

# On the way back a sum over ranks waits for every rank too.
GRADIENT = "whether a gradient is wanted"


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

    Raises, on every rank:
        TypeError, ValueError, fastkm.BackendUnavailableError: the arguments of some rank are refused, named with the
            rank; or ranks disagree about B, T, K, the dtype or what must be the same.
        torch.linalg.LinAlgError: as :func:`fastkm.write`.
        RuntimeError: no process group; a rank that has died, at the latest after the timeout of the group.

    Source: Wu et al., NeurIPS 2018, algorithm 1, in the inner products of its rows.
    """
    ranks = Ranks("write_sharded", group)

    def share() -> Share:
        mean, cov, values_, noise, ridges, count, _, mask_, _ = _checked(
            WRITE, backend, (state, values, noise_var, ridge, num_opt_iters, "ridge", mask, "ieee")
        )
        rows = mean, _without_masked(values_.to(mean.dtype), mask_)
        gram = _finite(Gram.apply(*rows), "state.mean or values")
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
        mean_, queries_, ridges, count, *_ = _checked(READ, backend, (mean, queries, ridge, num_iters, "ridge", "ieee"))
        queries_ = queries_.to(mean_.dtype)
        products = _products(mean_, queries_)
        for name, product in zip(("mean", "queries"), products, strict=True):
            _finite(product, name)
        facts = {"B": mean_.shape[0], "K": mean_.shape[1], "Q": queries_.shape[1], "num_iters": count, "ridge": ridges}
        facts[GRADIENT] = products[0].requires_grad or products[1].requires_grad
        return Share(facts, mean_.dtype, mean_.shape[2], (mean_, queries_, ridges, count, products))

    mean, queries, ridges, count, products = ranks.attempt(share)
    gram, addressed = ranks.sum(*products)
    factor, info = torch.linalg.cholesky_ex(_with_ridge(gram, ridges))
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square() - ridges.detach().unsqueeze(-1)
    if mean.dtype == torch.float32 and (info.any() or not holds_digits(gram, pivots, ridges, sum(ranks.columns))):
        gram, addressed = ranks.sum(*_products(mean.double(), queries.double()))
        ridges = ridges.double()
        factor, info = torch.linalg.cholesky_ex(_with_ridge(gram, ridges))
    status.raise_failures(_unfactored(info), "mean meanᵀ + ridge I")
    weights = iterate(torch.cholesky_solve(addressed, factor), ridges, factor, count).mT.to(mean.dtype)
    return ReadResult(weights @ mean, weights)


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
        mean, cov, weights_, _, noise, mask_, _ = _checked(UPDATE_POSTERIOR, backend, arguments)
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
        mean, cov, weights_, _, queries_, noise, kept, prior, forgotten, before, mask_, _ = _checked(
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
        mean, cov, weights_, values_, noise, mask_, _ = _checked(UPDATE_POSTERIOR, "reference", arguments)
        w, z, wide = (x.double() for x in (_without_masked(weights_, mask_), _without_masked(values_, mask_), mean))
        scaled = (w / noise.double().unsqueeze(-1)).mT
        sums = _finite(scaled @ w, "weights"), _finite(scaled @ (z - w @ wide), "values")
        facts = {"B": mean.shape[0], "K": mean.shape[1], "C": mean.shape[2], "state.mean": mean, "state.cov": cov}
        facts[GRADIENT] = any(x.requires_grad for x in sums)
        return Share(facts, mean.dtype, mean.shape[2], (mean, cov, sums))

    mean, cov, sums = ranks.attempt(share)
    precision, information = ranks.sum(*sums)
    root, info = torch.linalg.cholesky_ex((cov.double() + cov.double().mT) / 2)
    status.raise_failures(_unfactored(info), "state.cov")
    inner = _with_ridge(root.mT @ precision @ root, torch.ones_like(root[:, 0, 0]))
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), root.mT, upper=False)
    new_cov = half.mT @ half
    return MemoryState((mean.double() + new_cov @ information).to(mean.dtype), new_cov.to(mean.dtype))


def _checked(operation: Operation, backend: str | None, arguments: tuple) -> list:
    """What the operators take for a rank's ``arguments``, or an error in words, as the function of one process."""
    inputs = operation.check(arguments)
    dispatch.resolve(operation.name, backend, *[x for x in inputs if isinstance(x, Tensor)])
    return inputs


def _without_masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows.masked_fill(~mask.unsqueeze(-1), 0)


def _finite(product: Tensor, names: str) -> Tensor:
    """``product``, or an error that names the memories [B] in which it is not finite."""
    wrong = ~product.detach().isfinite().flatten(1).all(-1)
    if wrong.any():
        where = status.in_memories(wrong.nonzero().flatten().tolist())
        raise torch.linalg.LinAlgError(f"{names} is not finite{where}, or its square is not")
    return product


def _unfactored(info: Tensor) -> Tensor:
    return torch.where(info != 0, status.NOT_POSITIVE_DEFINITE, 0)


def _with_ridge(gram: Tensor, ridge: Tensor) -> Tensor:
    return gram + torch.diag_embed(ridge.unsqueeze(-1).expand(gram.shape[:2]))


def _products(mean: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """A rank's part of ``R Rᵀ [B, K, K]`` and of ``R z [B, K, Q]``."""
    return Gram.apply(mean, mean[:, :0]), mean @ queries.mT


def _root_of_all(
    ranks: Ranks, rows: tuple[Tensor, Tensor], gram: Tensor, ridge: Tensor, mask: Tensor | None
) -> tuple[Tensor, torch.dtype]:
    """The square root of the inner products of all columns, and the dtype that holds these."""
    (gram,) = ranks.sum(gram)
    columns = sum(ranks.columns)
    rank = min(gram.shape[1], columns)
    unread = None if mask is None else torch.nn.functional.pad(~mask, (rows[0].shape[1], 0))
    root, pivots = SquareRoot.apply(gram, rank, unread)
    if gram.dtype == torch.float64 or holds_digits(gram, pivots, ridge, columns):
        return root, gram.dtype
    (gram,) = ranks.sum(Gram.apply(*(x.double() for x in rows)))
    root, _ = SquareRoot.apply(gram, rank, unread)
    return root, gram.dtype


def _kl_of_columns(columns: int, noise_var: Tensor, innovation_var: Tensor) -> Tensor:
    """What ``columns`` of zeros add to the KL of each pattern: the small memory has fewer than all ranks hold."""
    explained = (innovation_var - noise_var).clamp_min(0)
    return 0.5 * columns * variance_divergence(noise_var / innovation_var, -explained / innovation_var)
