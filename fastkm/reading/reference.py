"""The specification in plain PyTorch: the literal loop through C, the loop that stays in K, and the codec's loop."""

from functools import partial

import torch

from fastkm._runtime.options import CODE_DTYPES
from fastkm.addressing.reference import factor_memory, must_factor_again, solve_addressing, solve_with
from fastkm.reading.attractor import iterate_attractor


def read_literal(mean, queries, ridge, num_iters, squared_gram):
    """Feed every read-out back as the next query: the definition of :func:`read`."""
    for _ in range(num_iters):
        weights, info = solve_addressing(mean, queries, ridge, squared_gram)
        queries = weights @ mean
    return queries, weights, info


def read(mean, queries, ridge, num_iters, squared_gram, precision=0, values_type=None):
    """The same weights from one factorisation: the loop stays in K. ``precision`` is for GPU kernels."""
    address = factor_memory(mean, ridge, squared_gram)
    weights = solve_with(address, mean, queries).mT  # [B, K, Q]
    weights = iterate(weights, ridge, address.factor, num_iters)
    return decode(weights, mean, values_type), weights.mT, address.info


def read_factored(mean, queries, ridge, lower, pseudoinverse, gram, num_iters, precision=0, values_type=None):
    if must_factor_again(mean, ridge):
        return read(mean, queries, ridge, num_iters, gram.shape[1] > 0, precision, values_type)
    weights = iterate((queries @ pseudoinverse).mT, ridge, lower, num_iters)
    return decode(weights, mean, values_type), weights.mT, mean.new_zeros(mean.shape[:1], dtype=torch.int32)


def iterate(weights, ridge, lower, num_iters):
    """``w ← w − λ A⁻¹ w`` for columns of weights, because (G + λI)⁻¹ G = I − λ (G + λI)⁻¹, and likewise with G²."""
    for _ in range(num_iters - 1):
        weights = weights - ridge.view(-1, 1, 1) * torch.cholesky_solve(weights, lower)
    return weights


def decode(weights, mean, values_type):
    values = weights.mT @ mean
    return values.to(CODE_DTYPES[values_type]) if values_type else values


def prepare(mean, ridge):
    """What :func:`fastkm.reading.attractor.iterate_attractor` asks for."""
    address = factor_memory(mean, ridge, False)

    def answer(code):
        weights = solve_with(address, mean, code)
        return weights @ mean, weights

    return answer, address.info


attractor_read = partial(iterate_attractor, prepare)
