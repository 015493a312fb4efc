"""What the presets launch: one call of every operator of the package, on memory that is never touched."""

from collections.abc import Callable

import torch

import fastkm.matrix_normal.triton
import fastkm.posterior.triton
import fastkm.reading.triton
import fastkm.writing.triton  # noqa: F401  all four register their operators
from fastkm.cli.presets import PRESETS

IEEE, TF32X3, TF32 = range(3)


def calls(preset: str, *, B: int, Q: int, precision: int = IEEE, squared_gram: bool = False) -> dict[str, Callable]:
    """Every operator at a preset's sizes, by name."""
    _, K, C, T = PRESETS[preset]
    mean, cov, weights, values = (torch.empty(B, *shape) for shape in ((K, C), (K, K), (T, K), (T, C)))
    queries, noise, ridge, read_weights = torch.empty(B, Q, C), torch.empty(B, T), torch.empty(B), torch.empty(B, Q, K)
    op = torch.ops.fastkm_triton
    rounding = (precision,)
    return {
        "update_posterior": lambda: op.update_posterior(mean, cov, weights, values, noise, None, *rounding),
        "update_posterior_backward": lambda: op.update_posterior_backward(
            mean, cov, weights, values, noise, None, *rounding, mean, cov, noise, noise, ridge
        ),
        "write": lambda: op.write(mean, cov, values, noise, ridge, 1, squared_gram, None, *rounding),
        "write_backward": lambda: op.write_backward(
            mean, cov, values, noise, ridge, 1, squared_gram, None, *rounding, weights, mean, cov, weights, noise, noise
        ),
        "read": lambda: op.read(mean, queries, ridge, 3, squared_gram, *rounding),
        "read_backward": lambda: op.read_backward(
            mean, queries, ridge, 3, squared_gram, *rounding, queries, read_weights
        ),
        "solve_addressing": lambda: op.solve_addressing(mean, queries, ridge, squared_gram),
        "factor_addressing": lambda: op.factor_addressing(mean, ridge),
        "solve_factored": lambda: op.solve_factored(mean, cov, queries),
        "kl_memory": lambda: op.kl_memory(mean, cov, mean, cov),
        "kl_memory_backward": lambda: op.kl_memory_backward(mean, cov, mean, cov, ridge),
        "logdet": lambda: op.logdet(cov),
        "logdet_backward": lambda: op.logdet_backward(cov, ridge),
    }
