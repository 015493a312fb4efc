"""Hostile memory: the values of a tensor in any layout, among entries that must not be read."""

import math

import torch
from torch import Tensor

LAYOUTS = ("displaced", "strided", "transposed", "batch_last")


def poisoned(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` as a view into storage that is NaN (or True) everywhere else.

    ``displaced`` starts off any vector boundary, ``strided`` has a gap after every entry of every axis, ``transposed``
    has its last two axes exchanged in memory, ``batch_last`` its first axis innermost.
    """
    fill = math.nan if x.is_floating_point() else True
    order = list(range(x.dim()))
    if layout == "displaced":
        view = torch.full((x.numel() + 14,), fill, dtype=x.dtype)[7 : 7 + x.numel()].view(x.shape)
    else:
        step = 2 if layout == "strided" else 1
        if layout == "transposed" and x.dim() > 1:
            order[-2:] = order[:-3:-1]
        elif layout == "batch_last":
            order = order[1:] + order[:1]
        storage = torch.full([step * x.shape[i] + 3 for i in order], fill, dtype=x.dtype)
        view = storage.permute([order.index(i) for i in range(x.dim())])
        view = view[tuple(slice(1, 1 + step * size, step) for size in x.shape)]
    return view.copy_(x)
