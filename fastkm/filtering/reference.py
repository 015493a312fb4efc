"""The specification in plain PyTorch: the filter step by step, and the chunk form that equals it.

The equations are those of docs/math/filtering.md.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkm._linalg.reference import clear_masked, first_failure, symmetry, variance_status
from fastkm._runtime.status import OUT_OF_RANGE

# Steps that are computed at once. Under forgetting, what a chunk subtracts is up to Π 1/γ times what is left, so its
# chunks are shorter: γ = 0.5 then costs four binary digits.
CHUNK, FORGETTING_CHUNK = 32, 4


def filter_sequential(
    mean, cov, weights, values, queries, noise_var, retention=None, prior_var=None, forgetting=None, read_before=False
):
    """The definition: decay, then write and read, step by step. Returns (mean, cov, values, variance, s, evidence)."""
    reads, variances, innovation_vars, evidence = [], [], [], torch.zeros_like(mean[:, 0, 0])
    identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    for t in range(weights.shape[1]):
        w, z, q = (x[:, t : t + 1] for x in (weights, values, queries))  # rows [B, 1, ·]
        if retention is not None:
            kept = retention[:, t, None, None]
            mean, cov = kept * mean, kept**2 * cov + (1 - kept**2) * prior_var[:, None, None] * identity
        if forgetting is not None:
            cov = cov / forgetting[:, t, None, None]
        prior = mean, cov
        a = w @ cov  # [B, 1, K]
        s, delta = a @ w.mT + noise_var[:, t, None, None], z - w @ mean
        mean, cov = mean + a.mT @ (delta / s), cov - a.mT @ (a / s)
        read_mean, read_cov = prior if read_before else (mean, cov)
        reads.append(q @ read_mean), variances.append((q @ read_cov @ q.mT).flatten(1))
        innovation_vars.append(s.flatten(1))
        evidence = evidence - 0.5 * ((2 * math.pi * s).log() + delta.square() / s).sum((1, 2))
    if not reads:
        return mean, cov, torch.zeros_like(values), noise_var.clone(), noise_var.clone(), evidence
    return mean, cov, torch.cat(reads, 1), torch.cat(variances, 1), torch.cat(innovation_vars, 1), evidence


def filter_block(
    mean, cov, weights, values, queries, noise_var, retention, prior_var, forgetting, read_before, mask, precision=0
):
    """A chunk of steps at once; see :func:`fastkm.filter_posterior` for the equations. ``precision`` is for GPUs."""
    if mask is not None:
        weights, values = clear_masked(weights, values, mask)
        retention, forgetting = (None if x is None else x.masked_fill(~mask, 1) for x in (retention, forgetting))
    info, reads, variances, innovation_vars, evidence = symmetry(cov), [], [], [], []
    size = CHUNK if forgetting is None else FORGETTING_CHUNK
    steps = (weights, values, queries, noise_var, retention, forgetting, mask)
    for part in _split(steps, size):
        chunk = Chunk(*part, prior_var)
        made = filter_chunk(mean, cov, chunk, read_before)
        mean, cov = made.mean, made.cov
        info = first_failure(info, made.info)
        reads.append(made.values), variances.append(made.variance), innovation_vars.append(made.innovation_var)
        evidence.append(made.log_likelihood)
    reads, variances, innovation_vars = (torch.cat(x, 1) for x in (reads, variances, innovation_vars))
    return mean, cov, reads, variances, innovation_vars, torch.cat(evidence, 1).sum(-1), info


class Chunk(NamedTuple):
    """Consecutive steps. Masked ones have zeros for weights and values, and do not decay."""

    weights: Tensor  # W [B, t, K]
    values: Tensor  # Z [B, t, C]
    queries: Tensor  # Q [B, t, K]
    noise_var: Tensor  # [B, t]
    retention: Tensor | None  # α [B, t]
    forgetting: Tensor | None  # γ [B, t]
    mask: Tensor | None  # [B, t]
    prior_var: Tensor  # u [B]


class Filtered(NamedTuple):
    """What a chunk makes."""

    mean: Tensor  # [B, K, C], after the chunk
    cov: Tensor  # [B, K, K]
    values: Tensor  # [B, t, C]
    variance: Tensor  # [B, t]
    innovation_var: Tensor  # [B, t]
    log_likelihood: Tensor  # [B, t]
    info: Tensor  # [B]


def filter_chunk(mean: Tensor, cov: Tensor, chunk: Chunk, read_before: bool) -> Filtered:
    """One chunk against the memory before it, by (F4) to (F9). A law of decay that is not given scales nothing."""
    kept, grown = _log_scale(chunk.retention, 1.0), _log_scale(chunk.forgetting, -0.5)
    scale = grown if kept is None else kept  # ln a [B, t]
    w, q, z = _scaled(chunk.weights, scale), _scaled(chunk.queries, scale), _scaled(chunk.values, grown)
    projected, read = w @ cov, q @ cov  # V and X [B, t, K]
    among, across = projected @ w.mT, read @ w.mT  # [B, t, t]
    own = (read * q).sum(-1)
    weighted = w.square() @ cov.detach().diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    if kept is not None:
        drift = drift_variance(kept, chunk.prior_var)
        added = drift * (chunk.weights @ chunk.weights.mT)
        among, across = among + added + added.tril(-1).mT, across + drift * (chunk.queries @ chunk.weights.mT)
        relaxed = -torch.expm1(2 * kept) * chunk.prior_var.unsqueeze(-1)  # (1 − a²) u
        own = own + relaxed * chunk.queries.square().sum(-1)
        weighted = weighted + (relaxed * chunk.weights.square().sum(-1)).detach().unsqueeze(-1)
    factor, failed = torch.linalg.cholesky_ex(among + torch.diag_embed(chunk.noise_var))
    gain_of_reads = torch.linalg.solve_triangular(factor, across.mT, upper=False).mT.tril(-1 if read_before else 0)
    error = torch.linalg.solve_triangular(factor, z - w @ mean, upper=False)
    new_mean, new_cov = _advance(mean, cov, chunk, kept, projected, factor, error)

    values, energy = q @ mean + gain_of_reads @ error, error.square().sum(-1)
    if grown is not None:
        values, energy = _scaled(values, -grown), energy * torch.exp(-2 * grown)
    variances = among.diagonal(dim1=-2, dim2=-1)
    explained = variances - factor.tril(-1).square().sum(-1)
    rows = (cov.shape[-1], chunk.noise_var, variances, explained, weighted.squeeze(-1), failed)
    info = _with_range(variance_status(*rows), new_cov, variances, chunk)
    innovation_var = explained.clamp_min(0) + chunk.noise_var
    log_likelihood = -0.5 * (z.shape[-1] * (2 * math.pi * innovation_var).log() + energy)
    if chunk.mask is not None:
        log_likelihood = log_likelihood * chunk.mask
    variance = (own - gain_of_reads.square().sum(-1)).clamp_min(0)
    return Filtered(new_mean, new_cov, values, variance, innovation_var, log_likelihood, info)


def drift_variance(kept: Tensor, prior_var: Tensor) -> Tensor:
    """(F6), its lower triangle: the covariance of two steps that relaxation adds since the start of the chunk.

    ``D_ij = u a_i/a_j (1 − a_j²)`` for ``j ≤ i``, from logarithms, so that nothing underflows.
    """
    gap = (kept.unsqueeze(-1) - kept.unsqueeze(-2)).tril()
    return (gap.exp() * -torch.expm1(2 * kept).unsqueeze(-2) * prior_var[:, None, None]).tril()


def _advance(mean, cov, chunk: Chunk, kept, projected: Tensor, factor: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """(F9): the memory after the chunk."""
    if kept is None or chunk.retention is None:
        gain = torch.linalg.solve_triangular(factor, projected, upper=False)
        new_cov = cov - gain.mT @ gain
        if chunk.forgetting is not None:
            new_cov = new_cov / chunk.forgetting.prod(-1)[:, None, None]
        return mean + gain.mT @ error, new_cov
    total, earlier = chunk.retention.log().sum(-1)[:, None, None], kept.unsqueeze(-1)  # ln a of the last and of each
    prior_var = chunk.prior_var[:, None, None]
    drift = (total - earlier).exp() * -torch.expm1(2 * earlier) * prior_var  # the last row of D, as a column
    gain = torch.linalg.solve_triangular(factor, total.exp() * projected + drift * chunk.weights, upper=False)
    relaxed = -torch.expm1(2 * total) * prior_var * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    return total.exp() * mean + gain.mT @ error, torch.exp(2 * total) * cov + relaxed - gain.mT @ gain


def _log_scale(decay: Tensor | None, exponent: float) -> Tensor | None:
    """(F4): ln a [B, t] of a decay [B, t], or None without one."""
    return None if decay is None else exponent * decay.log().cumsum(-1)


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows * scale.exp().unsqueeze(-1)


def _with_range(status: Tensor, new_cov: Tensor, variances: Tensor, chunk: Chunk) -> Tensor:
    """``status`` of a chunk, where forgetting has not made anything leave the range of the dtype."""
    if chunk.forgetting is None:
        return status
    in_range = new_cov.detach().diagonal(dim1=-2, dim2=-1).isfinite().all(-1) & variances.detach().isfinite().all(-1)
    return torch.where(in_range, status, OUT_OF_RANGE).int()


def _split(steps: tuple, size: int):
    """Chunks of ``size`` steps of every tensor [B, T, …]; None stays None."""
    count = len(steps[0].split(size, 1))
    return zip(*([None] * count if x is None else x.split(size, 1) for x in steps), strict=True)
