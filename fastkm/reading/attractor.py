"""The loop of an attractor read. It is plain PyTorch on every backend; a backend brings its own factor and read."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastkm._runtime import guards
from fastkm._runtime.deferred import is_value_unknown, known
from fastkm.matrix_normal.reference import kl_weights

IEEE = 0  # the precision code of a read in the loop


def iterate_attractor(prepare, mean, cov, queries, noise_var, ridge, num_iters, weight_var, tol, clean, *, skip=False):
    """See :func:`fastkm.attractor_read`; returns (values, weights, energy, num_iters, info).

    ``prepare(mean, ridge)`` factors the memories and returns a function, from codes to values and weights, and a
    status. On a GPU nothing waits for the device, so that the loop can be captured in a CUDA graph: all iterations run,
    and the results of queries that have stopped are dropped. ``skip``: elsewhere, queries that have stopped are not
    read again once they are half of a memory's.
    """
    answer, info = prepare(mean, ridge)
    code, active = queries.to(mean.dtype), torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
    taken = torch.zeros_like(active, dtype=torch.int64)
    energies: list[Tensor] = []

    def turn(code):
        values, weights = answer(code)
        return values, weights, pattern_energy(mean, cov, code, weights, values, noise_var, ridge, weight_var)

    state = turn(code)
    for i in range(num_iters):
        taken = taken + active
        if i > 0:
            before = state[0]
            state = _turn_active(turn, code, active, state) if skip else _select(active, turn(code), state)
            if tol is not None:
                moved = (state[0] - before).square().mean(-1).sqrt()  # [B, Q]
                active = active & ~(moved <= tol)  # a NaN goes on
        values, weights, energy = state
        energies.append(energy)
        if i + 1 == num_iters or _most_active(active) == 0:
            break
        code = torch.where(active.unsqueeze(-1), guards.cleaned(clean(values), values), code)
    energies += [energy] * (num_iters - len(energies))
    return values, weights, torch.stack(energies, -1), taken, info


def _select(active: Tensor, new: tuple, old: tuple) -> tuple:
    """``new`` results of active queries, ``old`` ones of the others."""
    where = (active.unsqueeze(-1), active.unsqueeze(-1), active)
    return tuple(map(torch.where, where, new, old))


def _most_active(active: Tensor) -> int:
    """The most queries of one memory that go on; all of them where nobody may ask or wait for the answer."""
    if active.is_cuda or is_value_unknown(active):
        return active.shape[1]
    held = known(active)
    if held.dim() != active.dim():  # under vmap
        return active.shape[1] if held.any() else 0
    return int(held.sum(1).amax()) if held.numel() else 0


def _turn_active(turn: Callable, code: Tensor, active: Tensor, state: tuple) -> tuple:
    """A turn of the active queries.

    Once they are half, as many of every memory are gathered, and a memory that has fewer adds some that have stopped.
    """
    count = _most_active(active)
    if 2 * count > active.shape[1]:
        return _select(active, turn(code), state)
    picked = active.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]  # [B, count]

    def index(x):
        return picked.unsqueeze(-1).expand(-1, -1, x.shape[2]) if x.dim() == 3 else picked

    def gather(x):
        return x.gather(1, index(x))

    def scatter(x, new):
        return x.scatter(1, index(x), new)

    old = tuple(map(gather, state))
    return tuple(map(scatter, state, _select(gather(active), turn(gather(code)), old)))


def pattern_energy(mean, cov, code, weights, values, noise_var, ridge, weight_var):
    """E(x, w) [B, Q] of a code x with weights w and values Rᵀw; :func:`fastkm.attractor_read` has the equation."""
    code_size = code.shape[-1]
    noise, prior_var = noise_var.unsqueeze(-1), (noise_var / ridge).unsqueeze(-1)  # [B, 1]
    squared = (code - values).square().sum(-1) + code_size * ((weights @ cov) * weights).sum(-1)
    if weight_var is not None:
        weight_var = weight_var.unsqueeze(-1)  # [B, 1]
        trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)
        squared = squared + weight_var * (mean.square().sum((-2, -1)) + code_size * trace).unsqueeze(-1)
        cost = kl_weights(weights, weight_var, prior_var)
    else:
        cost = 0.5 * (weights.square().sum(-1) / prior_var + weights.shape[-1] * (2 * math.pi * prior_var).log())
    return 0.5 * (code_size * (2 * math.pi * noise).log() + squared / noise) + cost


def attractor_of(factor_addressing: Callable, read_factored: Callable) -> Callable:
    """An attractor read made of the kernels of a backend: one factor, and a read for each iteration.

    The read has the gradient for ``mean`` and ``ridge`` that it would have if it factored anew, so the factor needs
    none.
    """

    def prepare(mean, ridge):
        pseudoinverse, lower, gram, info = factor_addressing(mean.detach(), ridge.detach(), False)

        def answer(code):
            return read_factored(mean, code, ridge, lower, pseudoinverse, gram, 1, IEEE, None)[:2]

        return answer, info

    return partial(iterate_attractor, prepare, skip=True)
