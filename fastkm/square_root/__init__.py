"""The square-root form of a memory, which holds its digits however small the noise is."""

from fastkm.square_root.api import from_square_root, to_square_root, update_square_root

__all__ = ["from_square_root", "to_square_root", "update_square_root"]
