"""Exact removal of patterns from a memory, as if they had never been written."""

from fastkm.removal.api import remove_patterns, replace_patterns

__all__ = ["remove_patterns", "replace_patterns"]
