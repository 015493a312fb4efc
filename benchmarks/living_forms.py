"""Removal, replacement and the update of a root in PyTorch's own operations, all patterns at once."""

import torch

from fastkm.testing.definitions import Result, new_patterns, square_root_of
from fastkm.testing.episodes import Episode


def remove(mean, cov, weights, values, noise_var) -> tuple:
    """V = W U, σ²I − V Wᵀ = L Lᵀ, G = L⁻¹V, E = L⁻¹(Z − W R); R − GᵀE, U + GᵀG."""
    projected = weights @ cov
    lower = torch.linalg.cholesky_ex(torch.diag_embed(noise_var) - projected @ weights.mT).L
    gain = torch.linalg.solve_triangular(lower, projected, upper=False)
    error = torch.linalg.solve_triangular(lower, torch.baddbmm(values, weights, mean, alpha=-1), upper=False)
    return torch.baddbmm(mean, gain.mT, error, alpha=-1), torch.baddbmm(cov, gain.mT, gain)


def remove_at_once(e: Episode) -> Result:
    mean, cov = remove(*e.written, e.weights, e.values, e.noise_var)
    return {"mean": mean, "cov": cov}


def replace_at_once(e: Episode) -> Result:
    """The gain of the new patterns, then the block form of a removal."""
    (mean, cov), (weights, values) = e.written, new_patterns(e)
    projected = weights @ cov
    innovation = projected @ weights.mT + torch.diag_embed(e.noise_var)
    gain = torch.cholesky_solve(projected, torch.linalg.cholesky_ex(innovation).L).mT
    mean = torch.baddbmm(mean, gain, torch.baddbmm(values, weights, mean, alpha=-1))
    mean, cov = remove(mean, torch.baddbmm(cov, gain, projected, alpha=-1), e.weights, e.values, e.noise_var)
    return {"mean": mean, "cov": cov}


def update_root_at_once(e: Episode) -> Result:
    """The reflections of all patterns in the space of the weights, and one change of the root."""
    (mean, root), noise = square_root_of(e), e.noise_var.unsqueeze(-1)
    projected, reflections, rows = e.weights @ root, [], []
    for t in range(e.weights.shape[1]):
        f = projected[:, t : t + 1]
        for other, c in reflections:
            f = f - (f @ other.mT / c) @ other
        s = f.square().sum(-1, keepdim=True) + noise[:, t : t + 1]
        row = f
        for other, c in reversed(reflections):
            row = row - (row @ other.mT / c) @ other
        reflections.append((f, s + (s * noise[:, t : t + 1]).sqrt()))
        rows.append(row / reflections[-1][1])
    root = torch.baddbmm(root, root @ torch.cat(rows, 1).mT, torch.cat([f for f, _ in reflections], 1), alpha=-1)
    gain = root @ (root.mT @ (e.weights / noise).mT)
    return {"mean": torch.baddbmm(mean, gain, e.values - e.weights @ mean), "root": root}
