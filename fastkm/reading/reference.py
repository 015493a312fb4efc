"""The specification in plain PyTorch: the literal loop through C, the loop that stays in K, and the codec's loop."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastkm._runtime import dispatch, guards
from fastkm._runtime.autograd import wants_gradient
from fastkm.addressing.reference import factor_addressing, factor_ridge, solve_addressing, solve_factored, solve_with
from fastkm.matrix_normal.reference import kl_weights


def read_literal(mean, queries, ridge, num_iters, squared_gram):
    """Feed every read-out back as the next query; the definition :func:`read` is held to."""
    for _ in range(num_iters):
        weights, info = solve_addressing(mean, queries, ridge, squared_gram)
        queries = weights @ mean
    return queries, weights, info


def read(mean, queries, ridge, num_iters, squared_gram):
    """The same weights from one factorisation: the loop stays in K."""
    address = factor_addressing(mean, ridge, squared_gram)
    weights = solve_with(address, mean, queries).mT  # [B, K, Q]
    for _ in range(num_iters - 1):
        # (G + λI)⁻¹ G = I − λ (G + λI)⁻¹, and likewise with G² for the squared-Gram solve.
        weights = weights - ridge.view(-1, 1, 1) * torch.cholesky_solve(weights, address.factor)
    return weights.mT @ mean, weights.mT, address.info


def attractor_read(
    mean, cov, queries, noise_var, ridge, clean, num_iters, weight_var, tol, factor=factor_ridge, solve=solve_factored
):
    """See :func:`fastkm.attractor_read`; returns (values, weights, energy, num_iters, info).

    ``factor`` and ``solve`` address the memory, the rest is the same for every backend. On a GPU nothing waits for the
    device, so that the loop can be captured in a CUDA graph: all iterations run, those of queries that stopped for
    nothing.
    """
    lower, info = factor(mean, ridge)
    code, active = queries, torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
    taken = torch.zeros_like(active, dtype=torch.int64)
    energies: list[Tensor] = []
    for i in range(num_iters):
        new_weights = solve(mean, lower, code)  # [B, Q, K]
        new_values = new_weights @ mean  # [B, Q, C]
        new_energy = pattern_energy(mean, cov, code, new_weights, noise_var, ridge, weight_var)
        taken = taken + active
        if i == 0:
            values, weights, energy = new_values, new_weights, new_energy
        else:
            moved = (new_values - values).square().mean(-1).sqrt()  # [B, Q]
            go = active.unsqueeze(-1)
            values, weights = torch.where(go, new_values, values), torch.where(go, new_weights, weights)
            energy = torch.where(active, new_energy, energy)
            if tol is not None:
                active = active & (moved > tol)
        energies.append(energy)
        if i + 1 == num_iters or not (active.is_cuda or active.any()):
            break
        code = torch.where(active.unsqueeze(-1), guards.cleaned(clean(values), values), code)
    energies += [energy] * (num_iters - len(energies))
    return values, weights, torch.stack(energies, -1), taken, info


def pattern_energy(mean, cov, code, weights, noise_var, ridge, weight_var):
    """E(x, w) [B, Q] of a code x with weights w; the equation is in :func:`fastkm.attractor_read`."""
    code_size = code.shape[-1]
    noise, prior_var = noise_var.unsqueeze(-1), (noise_var / ridge).unsqueeze(-1)  # [B, 1]
    squared = (code - weights @ mean).square().sum(-1) + code_size * ((weights @ cov) * weights).sum(-1)
    if weight_var > 0:
        trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)
        squared = squared + weight_var * (mean.square().sum((-2, -1)) + code_size * trace).unsqueeze(-1)
        cost = kl_weights(weights, weight_var, prior_var)
    else:
        cost = 0.5 * (weights.square().sum(-1) / prior_var + weights.shape[-1] * (2 * math.pi * prior_var).log())
    return 0.5 * (code_size * (2 * math.pi * noise).log() + squared / noise) + cost


def without_gradient(factor: Callable, solve: Callable) -> Callable:
    """``attractor_read`` with operators that have no gradient: a ``clean`` that would need one is refused."""

    def guarded(mean, lower, code):
        if wants_gradient((code,)):
            raise dispatch.BackendUnavailableError(
                "what clean returned requires a gradient, which these kernels do not have; take backend='reference', "
                "or call attractor_read under torch.no_grad()"
            )
        return solve(mean, lower, code)

    return partial(attractor_read, factor=factor, solve=guarded)
