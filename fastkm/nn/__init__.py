"""The memory as a module."""

from fastkm.nn.memory import KanervaMemory, MemoryPass
from fastkm.nn.mixer import KanervaMixer, MixerState

__all__ = ["KanervaMemory", "KanervaMixer", "MemoryPass", "MixerState"]
