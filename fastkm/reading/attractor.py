"""The loop of an attractor read. It is plain PyTorch on every backend; a backend brings its own two solves."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastkm._runtime import guards
from fastkm._runtime.autograd import wants_gradient
from fastkm._runtime.deferred import is_false_everywhere
from fastkm._runtime.errors import BackendUnavailableError
from fastkm.matrix_normal.reference import kl_weights


def iterate_attractor(factor, solve, mean, cov, queries, noise_var, ridge, num_iters, weight_var, tol, clean):
    """See :func:`fastkm.attractor_read`; returns (values, weights, energy, num_iters, info).

    ``factor(mean, ridge)`` returns the lower factor of ``R Rᵀ + λI`` and a status; ``solve(mean, factor, queries)``
    returns weights. On a GPU nothing waits for the device, so that the loop can be captured in a CUDA graph: all
    iterations run, and the results of queries that have stopped are dropped.
    """
    lower, info = factor(mean, ridge)
    code, active = queries.to(mean.dtype), torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
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
                active = active & ~(moved <= tol)  # a NaN goes on
        energies.append(energy)
        if i + 1 == num_iters or (not active.is_cuda and is_false_everywhere(active)):
            break
        code = torch.where(active.unsqueeze(-1), guards.cleaned(clean(values), values), code)
    energies += [energy] * (num_iters - len(energies))
    return values, weights, torch.stack(energies, -1), taken, info


def pattern_energy(mean, cov, code, weights, noise_var, ridge, weight_var):
    """E(x, w) [B, Q] of a code x with weights w; the equation is in :func:`fastkm.attractor_read`."""
    code_size = code.shape[-1]
    noise, prior_var = noise_var.unsqueeze(-1), (noise_var / ridge).unsqueeze(-1)  # [B, 1]
    squared = (code - weights @ mean).square().sum(-1) + code_size * ((weights @ cov) * weights).sum(-1)
    if weight_var is not None:
        weight_var = weight_var.unsqueeze(-1)  # [B, 1]
        trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)
        squared = squared + weight_var * (mean.square().sum((-2, -1)) + code_size * trace).unsqueeze(-1)
        cost = kl_weights(weights, weight_var, prior_var)
    else:
        cost = 0.5 * (weights.square().sum(-1) / prior_var + weights.shape[-1] * (2 * math.pi * prior_var).log())
    return 0.5 * (code_size * (2 * math.pi * noise).log() + squared / noise) + cost


def without_gradient(factor: Callable, solve: Callable) -> Callable:
    """An attractor read with solves that have no gradient: a ``clean`` that needs one is refused."""

    def solve_or_refuse(mean, lower, code):
        if wants_gradient((code,)):
            raise BackendUnavailableError(
                "what clean returned requires a gradient, which these kernels do not have; take backend='reference', "
                "or call attractor_read under torch.no_grad()"
            )
        return solve(mean, lower, code)

    return partial(iterate_attractor, factor, solve_or_refuse)
