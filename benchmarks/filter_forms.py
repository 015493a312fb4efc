"""The filter with retention as a good PyTorch user would write it: chunks, one Cholesky factor each, no checks."""

import math

import torch
from torch import Tensor

from fastkm.testing.definitions import FILTER, Result, filter_queries, filter_retention
from fastkm.testing.episodes import Episode

CHUNK = 64  # the fastest in eager PyTorch of 16, 32, 64 and 128, at 16 memories, T = 1,024, K = C = 64


def filter_chunks(e: Episode) -> Result:
    """Equations (F4) to (F9) of docs/math/filtering.md."""
    (mean, cov), evidence, made = e.prior, torch.zeros_like(e.ridge), []
    steps = (e.weights, e.values, filter_queries(e), e.noise_var, filter_retention(e))
    for w, z, q, noise, kept in zip(*(x.split(CHUNK, 1) for x in steps), strict=True):
        log_a = kept.log().cumsum(-1)
        a, relaxed = log_a.exp().unsqueeze(-1), -torch.expm1(2 * log_a) * e.ridge.unsqueeze(-1)
        drift = (log_a.unsqueeze(-1) - log_a.unsqueeze(-2)).tril().exp().tril() * relaxed.unsqueeze(-2)  # D
        both = torch.cat([w, q], 1)
        projected = torch.cat([a * w, a * q], 1) @ cov
        crossed = projected @ (a * w).mT  # S above H
        among, across = crossed[:, : w.shape[1]], crossed[:, w.shape[1] :]
        added = drift * (w @ w.mT)
        lower = torch.linalg.cholesky_ex(among + added + added.tril(-1).mT + torch.diag_embed(noise)).L
        gain = torch.linalg.solve_triangular(lower, (across + drift * (q @ w.mT)).mT, upper=False).mT.tril()  # P
        forecast = (a.repeat(1, 2, 1) * both) @ mean
        error = torch.linalg.solve_triangular(lower, z - forecast[:, : w.shape[1]], upper=False)
        own = (projected[:, w.shape[1] :] * (a * q)).sum(-1) + relaxed * q.square().sum(-1)
        made.append((forecast[:, w.shape[1] :] + gain @ error, own - gain.square().sum(-1), _diagonal(lower).square()))
        innovation_var = made[-1][-1]
        energy = error.square().sum((1, 2))
        evidence = evidence - 0.5 * (z.shape[-1] * (2 * math.pi * innovation_var).log().sum(-1) + energy)
        last, end = drift[:, -1].unsqueeze(-1), a[:, -1:]
        whitened = torch.linalg.solve_triangular(lower, end * projected[:, : w.shape[1]] + last * w, upper=False)
        mean = end * mean + whitened.mT @ error
        identity = torch.eye(cov.shape[-1], dtype=cov.dtype)
        cov = end.square() * cov + relaxed[:, -1:, None] * identity - whitened.mT @ whitened
    return dict(zip(FILTER, (mean, cov, *(torch.cat(x, 1) for x in zip(*made, strict=True)), evidence), strict=True))


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)
