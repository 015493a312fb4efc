"""The memory as a module."""

from fastkm.nn.memory import KanervaMemory

__all__ = ["KanervaMemory"]
