"""The specification in plain PyTorch: the literal loop through C, the loop that stays in K, and the codec's loop."""

from functools import partial

import torch

from fastkm.addressing.reference import factor_addressing, factor_ridge, solve_addressing, solve_factored, solve_with
from fastkm.reading.attractor import iterate_attractor


def read_literal(mean, queries, ridge, num_iters, squared_gram):
    """Feed every read-out back as the next query: the definition of :func:`read`."""
    for _ in range(num_iters):
        weights, info = solve_addressing(mean, queries, ridge, squared_gram)
        queries = weights @ mean
    return queries, weights, info


def read(mean, queries, ridge, num_iters, squared_gram, precision=0):
    """The same weights from one factorisation: the loop stays in K. ``precision`` is for GPU kernels."""
    address = factor_addressing(mean, ridge, squared_gram)
    weights = solve_with(address, mean, queries).mT  # [B, K, Q]
    for _ in range(num_iters - 1):
        # (G + λI)⁻¹ G = I − λ (G + λI)⁻¹, and likewise with G² for the squared-Gram solve.
        weights = weights - ridge.view(-1, 1, 1) * torch.cholesky_solve(weights, address.factor)
    return weights.mT @ mean, weights.mT, address.info


attractor_read = partial(iterate_attractor, factor_ridge, solve_factored)
