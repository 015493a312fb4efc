"""Memories that are larger than one process: columns or patterns split over the ranks of a process group."""

from fastkm.distributed.checkpoint import load_sharded, save_sharded
from fastkm.distributed.merging import merge_memories
from fastkm.distributed.reading import ShardedFactor, factor_sharded, read_factored_sharded, read_sharded
from fastkm.distributed.updating import filter_sharded, update_pooled, update_sharded
from fastkm.distributed.writing import write_sharded

__all__ = [
    "ShardedFactor",
    "factor_sharded",
    "filter_sharded",
    "load_sharded",
    "merge_memories",
    "read_factored_sharded",
    "read_sharded",
    "save_sharded",
    "update_pooled",
    "update_sharded",
    "write_sharded",
]
