"""The information form of a memory: patterns are added and subtracted, and memories are merged."""

from fastkm.information.api import from_information, merge_memories, to_information, update_information

__all__ = ["from_information", "merge_memories", "to_information", "update_information"]
