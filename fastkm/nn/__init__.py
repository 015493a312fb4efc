"""The memory as a module."""

from fastkm.nn.memory import KanervaMemory, MemoryPass

__all__ = ["KanervaMemory", "MemoryPass"]
