"""Writing an episode: address and update, one pattern after the other."""

from fastkm.writing.api import WriteResult, write

__all__ = ["WriteResult", "write"]
