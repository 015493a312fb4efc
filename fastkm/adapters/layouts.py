"""Time first, as other programs have it, and batch first, as this package has it."""

from torch import Tensor


def exchange(name: str, x: Tensor, shape: str) -> Tensor:
    """``[S, B, …]`` as ``[B, S, …]``; a view."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"{name} must be a tensor of shape {shape}, got {list(x.shape)}")
    return x.transpose(0, 1)
