"""Tensors of agreeing sizes, from which the arguments of every registered operator are picked."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkm.testing.presets import Preset


class Operands(NamedTuple):
    mean: Tensor  # [B, K, C]
    cov: Tensor  # [B, K, K]
    weights: Tensor  # [B, T, K]
    values: Tensor  # [B, T, C]
    queries: Tensor  # [B, Q, C]
    read_weights: Tensor  # [B, Q, K]
    noise_var: Tensor  # [B, T]
    ridge: Tensor  # [B]
    mask: Tensor | None = None  # [B, T]
    num_iters: int = 10  # of a read
    num_opt_iters: int = 1  # of a write
    squared_gram: bool = False
    precision: int = 0  # the precision code


def empty_operands(preset: Preset, batch: int, queries: int, device: str = "meta", **options: Any) -> Operands:
    """Float32 tensors that hold no values, without a mask; ``options`` are the other fields."""
    K, C, T = preset.K, preset.C, preset.T

    def tensor(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, device=device)

    return Operands(
        mean=tensor(K, C),
        cov=tensor(K, K),
        weights=tensor(T, K),
        values=tensor(T, C),
        queries=tensor(queries, C),
        read_weights=tensor(queries, K),
        noise_var=tensor(T),
        ridge=tensor(),
        **options,
    )
