"""Filtering in the layout of flash-linear-attention: sequences of heads ``[B, T, H, K]``, also packed into one."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastkm._runtime import guards
from fastkm.filtering.api import FilterResult, filter_posterior
from fastkm.state import MemoryState

__all__ = ["chunk_posterior"]


def chunk_posterior(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor | None = None,  # [B, T, H], ln α ≤ 0
    beta: Tensor | None = None,  # [B, T, H], 1/σ²
    scale: float = 1.0,
    initial_state: MemoryState | None = None,  # mean [N, HV, K, V], cov [N, H, K, K]
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1], int
    output_variance: bool = False,
    *,
    prior_var: float | Tensor = 1.0,  # float, 0-d or [H]
    read: str = "after",
    backend: str | None = None,
) -> tuple:
    """:func:`fastkm.filter_posterior` with the names, order and layout of flash-linear-attention.

    A head is a memory: its keys are weights, ``beta`` is the precision 1/σ² of its values, and ``exp(g)`` its
    retention. With ``g = None`` and an initial covariance ``diag(1/λ)`` it is MesaNet's layer, solved exactly.

    Args:
        q, k: queries and keys, used as they are; normalise them before.
        v: values. With ``HV = n H`` heads, value heads ``i n … i n + n − 1`` belong to key head ``i`` and share its
            covariance.
        g: logarithm of the retention; None keeps everything. With decay the memory relaxes to ``prior_var``.
        beta: precision of the values; None is 1.
        scale: factor of the queries. A read of a posterior is not rescaled, so 1 is the default; ``K**-0.5`` elsewhere.
        initial_state: mean and covariance before the sequence, in the dtype of the memory: float32, or float64 where
            ``q`` is float64. None is a mean of 0 and the covariance ``prior_var I``.
        output_final_state: whether to return the state after the sequence; None in its place otherwise.
        cu_seqlens: where sequences that are packed into one begin and end, ``[0, …, T]``, for ``B = 1``. The states
            then are those of ``N`` sequences. Its values are read on the host.
        output_variance: whether to return the variances of the reads too.
        prior_var: variance of the prior, one for all or one a head.
        read: ``"after"`` the value of the step is written, or ``"before"``.
        backend: as in :func:`fastkm.filter_posterior`.

    Returns:
        ``(o [B, T, HV, V], final_state)``, and then the variance ``[B, T, H]`` of every entry of ``o`` if it was asked
        for. ``o`` has the dtype of ``v``.

    Raises:
        TypeError, ValueError, torch.linalg.LinAlgError: as :func:`fastkm.filter_posterior`, where ``k`` is called
            weights, ``q`` queries, ``v`` values, ``1/beta`` noise_var and ``exp(g)`` retention; ``cu_seqlens`` that do
            not add up.

    The heads are copied: the kernels take each memory's steps one after another. Source of the layout:
    fla-org/flash-linear-attention, ``fla.ops``.
    """
    _check_heads(q, k, v, g, beta)
    dtype = memory_dtype(q)
    noise_var = q.new_ones(q.shape[:3], dtype=dtype) if beta is None else 1 / beta.to(dtype)
    steps = Steps(q if scale == 1 else scale * q, k, v, noise_var, None if g is None else g.to(dtype).exp(), None)
    if cu_seqlens is not None:
        steps = steps.unpack(packing(cu_seqlens, *q.shape[:2]))
    made, state = filter_heads(steps, initial_state, prior_var, read, backend)
    o, variance = made.values.to(v.dtype), made.variance
    if steps.mask is not None:
        o, variance = o[steps.mask].unsqueeze(0), variance[steps.mask].unsqueeze(0)
    final_state = state if output_final_state else None
    return (o, final_state, variance) if output_variance else (o, final_state)


class Steps(NamedTuple):
    """The steps of a batch of sequences."""

    queries: Tensor  # [B, T, H, K]
    keys: Tensor  # [B, T, H, K]
    values: Tensor  # [B, T, HV, V]
    noise_var: Tensor  # [B, T, H]
    retention: Tensor | None  # [B, T, H]
    mask: Tensor | None  # [B, T]

    def unpack(self, index: Tensor) -> "Steps":
        """One sequence a row, by the positions ``index [N, longest]``; −1 is no step."""
        queries, keys, values, noise_var = (x[0, index.clamp_min(0)] for x in self[:4])
        retention = None if self.retention is None else self.retention[0, index.clamp_min(0)]
        return Steps(queries, keys, values, noise_var, retention, index >= 0)


def memory_dtype(codes: Tensor) -> torch.dtype:
    return torch.float64 if codes.dtype == torch.float64 else torch.float32


def packing(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """The positions of every sequence in the packed one, [N, longest]; −1 past its end."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = guards.dtype_name(cu_seqlens.dtype) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be a tensor of int32 or int64, got {got}")
    if B != 1:
        raise ValueError(f"cu_seqlens says where one packed sequence is cut, so the batch must be 1, got {B}")
    ends = cu_seqlens.tolist() if cu_seqlens.dim() == 1 else []
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != T or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, got {cu_seqlens.tolist()}")
    starts, lengths = cu_seqlens[:-1].to(torch.int64), cu_seqlens.diff()
    offset = torch.arange(int(lengths.max()), device=cu_seqlens.device)
    return torch.where(offset < lengths.unsqueeze(-1), starts.unsqueeze(-1) + offset, -1)


def filter_heads(
    steps: Steps, state: MemoryState | None, prior_var: float | Tensor, read: str, backend: str | None
) -> tuple[FilterResult, MemoryState]:
    """Filter every head of every sequence. The result has heads ``[B, T, H, ·]``; so has the state."""
    B, T, H, K = steps.keys.shape
    HV, V = steps.values.shape[2:]
    group, dtype = HV // H, memory_dtype(steps.queries)
    per_head = torch.as_tensor(prior_var, dtype=dtype, device=steps.keys.device).expand(B, H)
    memory = _initial_memory(per_head, K, group * V) if state is None else _fold_state(state, B, H, HV, K, V)
    made = filter_posterior(
        memory,
        _fold(steps.keys),
        _fold(steps.values.reshape(B, T, H, group * V)),
        _fold(steps.queries),
        _fold(steps.noise_var),
        retention=None if steps.retention is None else _fold(steps.retention),
        prior_var=per_head.reshape(B * H),
        read=read,
        mask=None if steps.mask is None else steps.mask.repeat_interleave(H, 0),
        backend=backend,
    )
    mean = made.state.mean.reshape(B, H, K, group, V).transpose(2, 3).reshape(B, HV, K, V)
    unfolded = FilterResult(
        MemoryState(mean, made.state.cov.reshape(B, H, K, K)),
        _unfold(made.values, B).reshape(B, T, HV, V),
        _unfold(made.variance, B),
        _unfold(made.innovation_var, B),
        made.log_evidence.reshape(B, H),
    )
    return unfolded, unfolded.state


def _initial_memory(prior_var: Tensor, K: int, C: int) -> MemoryState:
    variances = prior_var.reshape(-1)
    cov = variances[:, None, None] * torch.eye(K, dtype=variances.dtype, device=variances.device)
    return MemoryState(cov.new_zeros(len(variances), K, C), cov)


def _fold_state(state: MemoryState, B: int, H: int, HV: int, K: int, V: int) -> MemoryState:
    mean, cov = guards.pair("initial_state", state)
    for name, x, shape in (("mean", mean, (B, HV, K, V)), ("cov", cov, (B, H, K, K))):
        if tuple(x.shape) != shape:
            raise ValueError(f"initial_state.{name} must have shape {list(shape)}, got {list(x.shape)}")
    folded = mean.reshape(B, H, HV // H, K, V).transpose(2, 3).reshape(B * H, K, -1)
    return MemoryState(folded, cov.reshape(B * H, K, K))


def _fold(x: Tensor) -> Tensor:
    """[B, T, H, …] as memories [B H, T, …]."""
    return x.transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, B: int) -> Tensor:
    return x.unflatten(0, (B, -1)).transpose(1, 2)


def _check_heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor [B, T, heads, dim], got {got}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {list(q.shape)}, got {list(k.shape)}")
    if v.shape[:2] != q.shape[:2] or v.shape[2] % max(q.shape[2], 1):
        raise ValueError(
            f"v must have shape [B, T, HV, V] with [B, T] = {list(q.shape[:2])} and HV a multiple of {q.shape[2]}, "
            f"got {list(v.shape)}"
        )
    for name, factor in (("g", g), ("beta", beta)):
        if factor is not None and factor.shape != q.shape[:3]:
            raise ValueError(
                f"{name} must have one number for each key head, {list(q.shape[:3])}, because the value heads of a "
                f"group share one covariance; got {list(factor.shape)}"
            )
