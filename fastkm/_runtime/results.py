"""What public functions return, made known to PyTorch; the one place that does so."""

from typing import TypeVar

import torch

from fastkm._runtime.torch_private import register_named_tuple

C = TypeVar("C", bound=type)


def result(cls: C, module: str = "fastkm") -> C:
    """Make a named tuple of ``module`` known to ``torch.load(weights_only=True)`` and to ``torch.export.save``."""
    torch.serialization.add_safe_globals([cls])
    register_named_tuple(cls, f"{module}.{cls.__name__}")
    return cls
