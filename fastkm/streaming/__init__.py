"""Streams: one pattern after the other, in place."""

from fastkm.streaming.api import MemoryStream, StreamUpdate, StreamWrite

__all__ = ["MemoryStream", "StreamUpdate", "StreamWrite"]
