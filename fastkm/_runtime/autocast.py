"""Mixed precision: under ``torch.autocast`` inputs may be of low precision; states and factors never are."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from fastkm._runtime.guards import LOW_PRECISION
from fastkm._runtime.torch_private import is_any_autocast_enabled, tree_leaves, tree_map

P = ParamSpec("P")
R = TypeVar("R")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Under autocast, take bfloat16 and float16 tensors as float32 and compute with autocast off.

    A codec given by the keyword ``clean`` belongs to the caller and runs under autocast.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not is_any_autocast_enabled():
            return function(*args, **kwargs)
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        device = next(filter(torch.is_autocast_enabled, devices), None)
        if device is None:
            return function(*args, **kwargs)
        args, kwargs = tree_map(_widened, (args, kwargs))
        if callable(clean := kwargs.get("clean")):
            kwargs["clean"] = torch.autocast(device)(lambda code: _widened(clean(code)))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def _widened(x):
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in LOW_PRECISION else x
