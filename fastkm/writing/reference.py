"""The specification in plain PyTorch: the literal loop, and the Gram-space form that equals it."""

import torch

from fastkm._linalg.reference import first_failure, symmetry
from fastkm.addressing.reference import solve_addressing
from fastkm.posterior.reference import update_block


def write_sequential(mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, precision=0):
    """Address a pattern, update with it, go on to the next. ``precision`` is for GPU kernels."""
    status = symmetry(cov)
    weights, innovation_var, kl = [], [], []
    for t in range(values.shape[1]):
        now = slice(t, t + 1)
        here = None if mask is None else mask[:, now]
        z = values[:, now] if here is None else values[:, now].masked_fill(~here.unsqueeze(-1), 0)
        candidate = mean
        for _ in range(num_opt_iters):
            w, unsolved = solve_addressing(candidate, z, ridge, squared_gram)
            w = w if here is None else w.masked_fill(~here.unsqueeze(-1), 0)
            candidate, new_cov, s, step_kl, _, failed = update_block(mean, cov, w, z, noise_var[:, now], here)
            status = first_failure(status, torch.maximum(unsolved, failed))
        mean, cov = candidate, new_cov
        weights.append(w), innovation_var.append(s), kl.append(step_kl)
    if not weights:
        nothing = values.new_zeros((*values.shape[:2], mean.shape[1]))
        return mean.clone(), cov.clone(), nothing, noise_var.clone(), torch.zeros_like(noise_var), status
    return mean, cov, torch.cat(weights, 1), torch.cat(innovation_var, 1), torch.cat(kl, 1), status


def write_gram_space(mean, cov, values, noise_var, ridge):
    """The same weights without leaving K and T: one Gram product, T steps, one block update.

    The matrix solved with changes by rank two a step, ``A' = A + [c w] [[d, λ], [λ, 0]] [c w]ᵀ``, where
    ``c = U w / s`` and ``d = ‖z − Rᵀw‖²``, so each step costs one factorisation of a K × K matrix and no product
    with C. Returns (mean, cov, weights, innovation_var, kl).
    """
    lam = ridge.view(-1, 1, 1)
    gram = mean @ mean.mT + lam * torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)  # A [B, K, K]
    cross, inner = values @ mean.mT, values @ values.mT  # X [B, T, K], Q [B, T, T]
    row_cov, weights = cov, []
    for t in range(values.shape[1]):
        x = cross[:, t].unsqueeze(-1)  # [B, K, 1]
        w = torch.cholesky_solve(x, torch.linalg.cholesky(gram))  # [B, K, 1]
        a = row_cov @ w
        c = a / (w.mT @ a + noise_var[:, t].view(-1, 1, 1))
        d = inner[:, t, t].view(-1, 1, 1) - w.mT @ x - lam * (w.mT @ w)
        gram = gram + lam * (c @ w.mT + w @ c.mT) + d * (c @ c.mT)
        cross = cross + (inner[:, t].unsqueeze(-1) - cross @ w) @ c.mT
        row_cov = row_cov - a @ c.mT
        weights.append(w.mT)
    weights = torch.cat(weights, 1)
    mean, cov, innovation_var, kl, _, _ = update_block(mean, cov, weights, values, noise_var, None)
    return mean, cov, weights, innovation_var, kl
