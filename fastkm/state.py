"""The state of a memory, and the letters every shape in this package is written with.

======  ==========================================================
letter  axis
======  ==========================================================
B       independent memories (one per episode)
T       patterns written
Q       queries read
K       rows of a memory (slots)
C       size of a code (columns)
n       read iterations
======  ==========================================================

Layout is batch first: values ``[B, T, C]``, weights ``[B, T, K]``, mean ``[B, K, C]``, cov ``[B, K, K]``.
"""

from os import PathLike
from typing import NamedTuple

from torch import Tensor


class MemoryState(NamedTuple):
    """A memory ``M [K, C]`` whose columns are independent Gaussians that share one covariance.

    ``M[:, c] ~ N(mean[:, c], cov)`` for every column ``c``, so ``M`` is matrix normal with row covariance
    ``cov`` and the identity as column covariance.
    """

    mean: Tensor  # [B, K, C]
    cov: Tensor  # [B, K, K], symmetric positive definite


def save_memory_state(state: MemoryState, path: str | PathLike[str]) -> None:
    """Write ``state`` to ``path`` in the safetensors format (needs the ``safetensors`` extra)."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state._asdict().items()}, path)


def load_memory_state(path: str | PathLike[str], device: str = "cpu") -> MemoryState:
    """Read back what :func:`save_memory_state` wrote (needs the ``safetensors`` extra)."""
    from safetensors.torch import load_file

    return MemoryState(**load_file(path, device=device))
