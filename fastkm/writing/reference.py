"""The specification in plain PyTorch: the literal loop, and the Gram-space form that equals it."""

import torch

from fastkm._linalg.reference import clear_rows, factor_status, first_failure, symmetry, variance_divergence
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


def write_gram(gram, cov, noise_var, ridge, columns, num_opt_iters, mask):
    """The write of a memory of which ``Y Yᵀ [B, K + T, K + T]`` is known, with ``Y = [R; Z]`` of so many ``columns``.

    An update ``R + c δᵀ`` with ``δ = z_t − Rᵀw`` is one of the rows of Y, and of the columns of ``Y Yᵀ``. Returns (cov,
    weights, innovation_var, kl, the pivots of ``Y Yᵀ + λI`` [B, K + T], status).
    """
    K, patterns = cov.shape[1], gram.shape[1] - cov.shape[1]
    unread = None if mask is None else torch.nn.functional.pad(mask, (K, 0), value=True)
    gram = clear_rows(clear_rows(gram, unread).mT, unread)
    identity = torch.eye(K + patterns, dtype=gram.dtype, device=gram.device)
    pivots = torch.linalg.cholesky_ex(gram + ridge.view(-1, 1, 1) * identity).L.diagonal(dim1=-2, dim2=-1).square()
    status, weights, variances, kl = symmetry(cov), [], [], []
    for t in range(patterns):
        changed = gram
        for _ in range(num_opt_iters):
            system = changed[:, :K, :K] + ridge.view(-1, 1, 1) * identity[:K, :K]
            factor, failed = torch.linalg.cholesky_ex(system)
            status = first_failure(status, factor_status(factor, failed))
            w = torch.cholesky_solve(changed[:, :K, K + t, None], factor)  # [B, K, 1]
            a = cov @ w
            s = w.mT @ a + noise_var[:, t].view(-1, 1, 1)
            c = torch.nn.functional.pad(a / s, (0, 0, 0, patterns))  # of the rows of Y
            innovation = identity[:, K + t, None] - torch.nn.functional.pad(w, (0, 0, 0, patterns))  # δ = Yᵀ of it
            squared = innovation.mT @ gram @ innovation
            changed = gram + c @ (innovation.mT @ gram) + gram @ innovation @ c.mT + squared * (c @ c.mT)
        gram, cov = changed, cov - a @ a.mT / s
        noise, beta = noise_var[:, t], ((s - noise_var[:, t].view(-1, 1, 1)) / s).flatten()
        energy = (squared / s).flatten().clamp_min(0)
        kl.append((columns * variance_divergence(noise / s.flatten(), -beta) + beta * energy) / 2)
        weights.append(w.mT), variances.append(s.flatten())
    if not weights:
        return cov.clone(), cov.new_zeros(len(cov), 0, K), noise_var.clone(), noise_var.clone(), pivots, status
    return cov, torch.cat(weights, 1), torch.stack(variances, 1), torch.stack(kl, 1), pivots, status
