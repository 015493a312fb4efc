"""The step of a stream in plain PyTorch, for every device; csrc/cpu/streaming says the same in C++.

With weights w, innovation δ = z − Rᵀ w, a = U w, s = w·a + σ² and c = a/s a pattern changes the memory, and the inverse
H of A = R Rᵀ + λI that is carried with it, by::

    R' = R + c δᵀ    U' = U − a aᵀ/s    A' = A + c rᵀ + r cᵀ + d c cᵀ    with r = R δ, d = δ·δ
    H' = H − p pᵀ/α + (α/D) h hᵀ    with p = H c, q = H r, α = c·p, β = c·q, κ = d − r·q,
                                         D = (1 + β)² + α κ, h = q − p (1 + β)/α

All changes of symmetric matrices are squares, so these stay symmetric to the last bit. Weights are found with H and
corrected by v = H ρ with the residual ρ = R δ − λ w, which is taken from R itself, until both are of the size of their
rounding. If that takes too many corrections, H is computed anew, at last in float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkm._linalg.reference import variance_divergence
from fastkm._runtime.status import LOST, NOT_POSITIVE_DEFINITE

MOST_CORRECTIONS = 4
LEAST_DIGITS = 16  # as in fastkm/posterior/reference.py


@dataclass
class Memory:
    """Views of the tensors of a stream, which are changed in place."""

    mean: Tensor  # R [B, K, C]
    cov: Tensor  # U [B, K, K]
    inverse: Tensor  # H [B, K, K]
    ridge: Tensor  # λ [B, 1]


@dataclass
class Change:
    """What a pattern does to every memory; vectors are [B, K] and [B, C], numbers [B, 1]."""

    w: Tensor
    a: Tensor
    c: Tensor
    r: Tensor
    delta: Tensor
    p: Tensor
    h: Tensor
    explained: Tensor
    s: Tensor
    d: Tensor
    status: Tensor  # [B]


def stream_patterns(mean, cov, inverse, refreshes, weights, values, noise_var, ridge, num_opt_iters, mask):
    """The operator of the same name; see :mod:`fastkm._runtime.schema`."""
    size = mean.shape[1]
    memory = Memory(mean[..., : values.shape[-1]], cov[..., :size], inverse[..., :size], ridge.unsqueeze(-1))
    noise = noise_var.unsqueeze(-1)
    found, explained, energy, status, written = [], [], [], [], []
    for t in range(values.shape[1]):
        here = torch.ones_like(ridge, dtype=torch.bool) if mask is None else mask[:, t]
        z = values[:, t].masked_fill(~here.unsqueeze(-1), 0)
        if weights is None:
            change = address(memory, z, noise, num_opt_iters, refreshes)
        else:
            change = change_by(memory, weights[:, t].masked_fill(~here.unsqueeze(-1), 0), z, noise)
        info = change.status.masked_fill(~here, 0)
        good = (here & (info == 0)).unsqueeze(-1)
        apply(memory, change, good, refreshes)
        found.append(change.w.masked_fill(~good, 0)), explained.append(change.explained.masked_fill(~good, 0))
        energy.append((change.d / change.s).masked_fill(~good, 0)), status.append(info), written.append(good)
    if not status:
        nothing = values.new_zeros(values.shape[:2])
        found = values.new_zeros((*values.shape[:2], size))
        return found, nothing, nothing.clone(), torch.zeros_like(ridge), nothing.int()
    reports = report(noise, *(torch.cat(x, 1) for x in (explained, energy, written)), values.shape[-1])
    found = torch.stack(found, 1) if weights is None else weights.new_empty((len(mean), 0, size))
    return found, *reports, torch.stack(status, 1)


def refresh_streams(mean, inverse, ridge):
    """The operator of the same name: H = (R Rᵀ + λI)⁻¹ in place, in float64 where the memory's dtype cannot factor."""
    held = inverse[..., : mean.shape[1]]
    failed = torch.ones_like(ridge, dtype=torch.bool)
    for dtype in (mean.dtype, torch.float64):
        fresh, still = invert(mean.to(dtype), ridge.to(dtype))
        held.copy_(torch.where((failed & ~still).view(-1, 1, 1), fresh.to(mean.dtype), held))
        failed = failed & still
        if not bool(failed.any()):
            break
    return (NOT_POSITIVE_DEFINITE * failed.int()).int()


def invert(mean: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """(R Rᵀ + λI)⁻¹, symmetric to the last bit, and where it could not be factored [B]."""
    matrix = mean @ mean.mT + torch.diag_embed(ridge.unsqueeze(-1).expand(mean.shape[:2]))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    bad = (failed != 0) | ~factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    lower = torch.cholesky_inverse(torch.where(bad.view(-1, 1, 1), torch.eye(mean.shape[1]).to(factor), factor)).tril()
    return lower + lower.tril(-1).mT, bad


def times(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def norm(x: Tensor) -> Tensor:
    return dot(x, x).sqrt()


def address(memory: Memory, z: Tensor, noise: Tensor, num_opt_iters: int, refreshes: Tensor) -> Change:
    """The change by the weights that the memory gives ``z``; H is computed anew where it does not serve."""
    change, converged = search(memory, z, noise, num_opt_iters)
    for dtype in (z.dtype, torch.float64):
        if bool(converged.all()):
            return change
        refresh(memory, ~converged.squeeze(-1), refreshes, dtype)
        change, converged = search(memory, z, noise, num_opt_iters)
    failed = ~converged.squeeze(-1) & (change.status == 0)
    change.status = torch.where(failed, NOT_POSITIVE_DEFINITE, change.status)
    return change


def refresh(memory: Memory, stale: Tensor, refreshes: Tensor, dtype: torch.dtype) -> None:
    """Compute H of the ``stale [B]`` memories anew in ``dtype``, where it can be factored there."""
    fresh, failed = invert(memory.mean.to(dtype), memory.ridge.squeeze(-1).to(dtype))
    memory.inverse.copy_(torch.where((stale & ~failed).view(-1, 1, 1), fresh.to(memory.mean.dtype), memory.inverse))
    refreshes += stale


def search(memory: Memory, z: Tensor, noise: Tensor, num_opt_iters: int) -> tuple[Change, Tensor]:
    """The change of a pattern with H as it is, and for which memories its weights were found [B, 1]."""
    x, size = times(memory.mean, z), memory.mean.flatten(1).norm(dim=-1, keepdim=True)
    converged = torch.ones_like(noise, dtype=torch.bool)
    before = None
    for _ in range(num_opt_iters):
        if before is not None:
            converged &= inverse_follows(memory, before)
            size = size + norm(before.c) * before.d.sqrt()
        w, reached = solve(memory, x, z, size, before)
        converged &= reached
        change = change_by(memory, w, z, noise)
        before = change
    return change, converged


def solve(memory: Memory, x: Tensor, z: Tensor, size: Tensor, before: Change | None) -> tuple[Tensor, Tensor]:
    """Weights of ``z`` for the memory, or for the memory that the change ``before`` gives, and where they are exact."""
    eps = torch.finfo(z.dtype).eps
    w = times_inverse(memory, x if before is None else x + before.c * dot(before.delta, z), before)
    last, least = torch.full_like(size, torch.inf), eps * (2 + math.sqrt(w.shape[-1]) / 4)
    finite, done = z.isfinite().all(-1, keepdim=True), torch.zeros_like(size, dtype=torch.bool)
    for corrections in range(MOST_CORRECTIONS + 1):
        delta = z - times(memory.mean.mT, w)
        residual = times(memory.mean, delta) - memory.ridge * w
        if before is not None:
            g = dot(before.c, w)
            residual = residual - g * before.r + before.c * (dot(before.delta, delta) - g * before.d)
        rounding = eps * (size * (norm(z) + size * norm(w)) + memory.ridge * norm(w))
        reached = norm(residual) <= rounding
        if corrections == MOST_CORRECTIONS:
            break
        correction = times_inverse(memory, residual, before)
        error = norm(correction)
        done = done | ~finite | (reached & ((error <= least * norm(w)) | (2 * error > last)))
        if bool(done.all()):
            break
        w, last = torch.where(done, w, w + correction), error
    return w, reached | done  # no inverse serves a pattern that is not finite; it will be refused


def times_inverse(memory: Memory, x: Tensor, before: Change | None) -> Tensor:
    y = times(memory.inverse, x)
    return y if before is None else y - before.p * dot(before.p, x) + before.h * dot(before.h, x)


def change_by(memory: Memory, w: Tensor, z: Tensor, noise: Tensor) -> Change:
    """What the pattern ``z`` does with weights ``w``, and whether it can be written."""
    eps, size = torch.finfo(z.dtype).eps, w.shape[-1]
    delta = z - times(memory.mean.mT, w)
    a = times(memory.cov, w)
    explained, d = dot(w, a), dot(delta, delta)
    slack = 4 * (size + 1) * eps * (explained + noise).abs()
    indefinite = ~(explained >= -slack) | ~explained.isfinite() | ~d.isfinite()
    explained = torch.where(indefinite, 0, explained.clamp_min(0))
    s = explained + noise
    scale = dot(w.square(), memory.cov.diagonal(dim1=-2, dim2=-1))
    lost = ~(explained * (noise / s) >= LEAST_DIGITS * eps * scale)
    status = torch.where(indefinite, NOT_POSITIVE_DEFINITE, LOST * lost.int()).int().squeeze(-1)
    r = times(memory.mean, delta)
    return Change(w, a, a / s, r, delta, a, a, explained, s, d, status)


def inverse_follows(memory: Memory, change: Change) -> Tensor:
    """Compute ``p`` and ``h`` of a change. False [B, 1] where rounding leaves no positive definite H'."""
    p, q = times(memory.inverse, change.c), times(memory.inverse, change.r)
    alpha, beta, kappa = dot(change.c, p), dot(change.c, q), change.d - dot(change.r, q)
    determinant = (1 + beta).square() + alpha * kappa.clamp_min(0)
    of_p, of_h, along = alpha.rsqrt(), (alpha / determinant).sqrt(), (1 + beta) / alpha
    change.p, change.h = of_p * p, of_h * (q - along * p)
    return (alpha > 0) & of_p.isfinite() & (of_h > 0) & along.isfinite()


def apply(memory: Memory, change: Change, good: Tensor, refreshes: Tensor) -> None:
    """Write a change to the memories where it is ``good [B, 1]``, and let H follow."""
    follows = inverse_follows(memory, change)
    changes = good & (dot(change.c, change.c) > 0)

    def add(to: Tensor, factor: Tensor, row: Tensor, where: Tensor) -> None:
        to.addcmul_(factor.masked_fill(~where, 0).unsqueeze(-1), row.masked_fill(~where, 0).unsqueeze(-2))

    a = change.a / change.s.sqrt()
    add(memory.mean, change.c, change.delta, good)
    add(memory.cov, -a, a, good)
    add(memory.inverse, -change.p, change.p, changes & follows)
    add(memory.inverse, change.h, change.h, changes & follows)
    if bool((stale := changes & ~follows).any()):
        refresh(memory, stale.squeeze(-1), refreshes, memory.mean.dtype)


def report(noise: Tensor, explained: Tensor, energy: Tensor, written: Tensor, size: int) -> tuple[Tensor, ...]:
    """Innovation variances, divergences [B, T] and the log evidence [B] of a stream's patterns."""
    s = explained + noise
    beta = explained / s
    divergence = variance_divergence(noise / s, -beta)
    kl = 0.5 * (size * divergence + beta * energy)
    log_density = -0.5 * (size * (2 * torch.pi * s).log() + energy)
    return s, kl, log_density.masked_fill(~written, 0).sum(1)
