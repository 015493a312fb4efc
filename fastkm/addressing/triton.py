"""A solve is a read whose values nobody wants: the kernels are those of fastkm/reading/triton.py."""

from fastkm.reading.triton import solve_addressing

__all__ = ["solve_addressing"]
