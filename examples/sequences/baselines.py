"""Layers beside the filter, from the equations of their papers: keys and values are written, queries answered.

The first half takes keys [B, T, K], values [B, T, C] and queries [B, T, K], and reads at each step before it writes.
The second half trains fast, without a loop over steps: ``*_causal`` read at each step after it is written, and
``*_last`` read only after the last, with any number of queries. Batch dimensions may be more than one there.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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


# ---- without a loop over steps --------------------------------------------------------------------------------------


def softmax_causal(k: Tensor, v: Tensor, q: Tensor) -> Tensor:
    """Σ_{s≤t} softmax(qᵀk_s / √K) v_s. Vaswani et al., 2017."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def softmax_last(k: Tensor, v: Tensor, q: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def normalised_sum_causal(k: Tensor, v: Tensor, q: Tensor) -> Tensor:
    """Σ_{s≤t} (qᵀk_s) v_s / Σ_{s≤t} qᵀk_s for features that are not negative. Katharopoulos et al., 2020."""
    products = (q @ k.mT).tril()
    return products @ v / (products.sum(-1, keepdim=True) + 1e-6)


def normalised_sum_last(k: Tensor, v: Tensor, q: Tensor) -> Tensor:
    products = q @ k.mT
    return products @ v / (products.sum(-1, keepdim=True) + 1e-6)


def delta_rule_causal(k: Tensor, v: Tensor, q: Tensor, beta: Tensor) -> Tensor:
    """Reads of S ← S + β_t k_t (v_t − Sᵀk_t)ᵀ for β [..., T]. Schlag et al., 2021."""
    return (q @ k.mT).tril() @ _corrections(k, v, beta)


def delta_rule_last(k: Tensor, v: Tensor, q: Tensor, beta: Tensor) -> Tensor:
    return q @ k.mT @ _corrections(k, v, beta)


def _corrections(k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """u_t = β_t (v_t − Σ_{s<t} (k_tᵀk_s) u_s), so that S is Σ k_t u_tᵀ: one triangular solve (Yang et al., 2024)."""
    beta = beta.unsqueeze(-1)
    lower = (beta * (k @ k.mT)).tril(-1)
    return torch.linalg.solve_triangular(lower, beta * v, upper=False, unitriangular=True)


# ---- features -------------------------------------------------------------------------------------------------------


def elu_plus_one(x: Tensor) -> Tensor:
    """The feature map of Katharopoulos et al., 2020."""
    return torch.nn.functional.elu(x) + 1


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Deterministic parameter-free projection to 2 ν K features. Schlag et al., 2021."""
    r = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)
