"""Memories that are larger than one process: columns or patterns split over the ranks of a process group."""

from fastkm.distributed.api import filter_sharded, read_sharded, update_pooled, update_sharded, write_sharded
from fastkm.distributed.checkpoint import load_sharded, save_sharded

__all__ = [
    "filter_sharded",
    "load_sharded",
    "read_sharded",
    "save_sharded",
    "update_pooled",
    "update_sharded",
    "write_sharded",
]
