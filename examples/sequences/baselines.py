"""Layers beside the filter, from the equations of their papers: keys and values are written, queries answered.

Every function takes keys [B, T, K], values [B, T, C] and queries [B, T, K], and reads at each step before it writes.
"""

import torch
from torch import Tensor

from fastkm import MemoryState, filter_posterior


def exact(k: Tensor, v: Tensor, q: Tensor, noise_var: float) -> tuple[Tensor, Tensor, MemoryState]:
    """The posterior under a standard normal prior: its reads, their variances, and the memory at the end."""
    B, _, K = k.shape
    prior = MemoryState(k.new_zeros(B, K, v.shape[-1]), torch.eye(K, dtype=k.dtype).repeat(B, 1, 1))
    made = filter_posterior(prior, k, v, q, noise_var, read="before")
    return made.values, made.variance, made.state


def gated_delta_rule(k: Tensor, v: Tensor, q: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """S ← α S, then S ← S + β k (v − Sᵀk)ᵀ; the delta rule for α = 1. Yang et al., 2024."""
    state, reads = k.new_zeros(k.shape[0], k.shape[2], v.shape[2]), []
    for w, z, x in zip(k.split(1, 1), v.split(1, 1), q.split(1, 1), strict=True):
        reads.append(x @ state)
        state = alpha * state
        state = state + beta * w.mT @ (z - w @ state)
    return torch.cat(reads, 1), state


def linear_attention(k: Tensor, v: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """S ← S + β k vᵀ. Katharopoulos et al., 2020, without a feature map."""
    written = beta * (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1)
    before = torch.cat([torch.zeros_like(written[:, :1]), written[:, :-1]], 1)
    return (q.unsqueeze(-2) @ before).squeeze(-2), written[:, -1]


def conjugate_gradients(gram: Tensor, queries: Tensor, ridge: float, steps: int, dtype: torch.dtype) -> Tensor:
    """(G + λI)⁻¹ q for queries [B, n, K] by ``steps`` steps, with products and vectors in ``dtype``, sums in float32.

    So MesaNet reads (von Oswald et al., 2025): a fixed count of steps, and 1e-5 in every denominator.
    """
    matrix = (gram + ridge * torch.eye(gram.shape[-1])).to(dtype)
    x, r = torch.zeros_like(queries), queries.clone()
    p, rr = r, r.square().sum(-1, keepdim=True)
    for _ in range(steps):
        product = (p.to(dtype) @ matrix).float()
        a = rr / ((p * product).sum(-1, keepdim=True) + 1e-5)
        x, r = x + a * p, r - a * product
        before, rr = rr, r.square().sum(-1, keepdim=True)
        p = r + rr / (before + 1e-5) * p
    return x
