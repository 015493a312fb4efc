"""A sharded state on disk, by torch.distributed.checkpoint: some ranks save it, any number of ranks load it."""

import os
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from fastkm._files import AnyPath
from fastkm._runtime import guards
from fastkm.distributed.ranks import Group, Ranks, Share
from fastkm.state import MemoryState

__all__ = ["load_sharded", "save_sharded"]


def save_sharded(state: MemoryState, path: AnyPath, *, group: Group = None) -> None:
    """Save a memory whose columns are split over ranks; every rank writes its own columns.

    The folder is a checkpoint of :mod:`torch.distributed.checkpoint` with the tensors ``mean [B, K, C]`` and
    ``cov [B, K, K]``. Other programs can load it as such, for example into DTensors of any placement.

    Args:
        state: mean: the columns of this rank, any number of them, in the order of the ranks. cov: the whole.
        path: a folder that all ranks reach.
        group: as in :func:`write_sharded`.

    What is wrong on one rank is raised on every rank.

    Raises:
        TypeError, ValueError: the state of some rank is refused, or the ranks do not hold parts of one memory.
        torch.distributed.checkpoint.CheckpointException: some rank cannot write.
    """
    ranks = Ranks("save_sharded", group)

    def share() -> Share:
        mean, cov = (x.detach() for x in guards.Signature().state("state", state))
        facts = {"B": mean.shape[0], "K": mean.shape[1], "state.cov": cov}
        return Share(facts, mean.dtype, mean.shape[2], (mean, cov, os.fsdecode(path)))

    mean, cov, folder = ranks.attempt(share)
    parts = {"mean": Columns(mean, ranks.columns, ranks.rank), "cov": cov.contiguous()}
    dcp.save(parts, checkpoint_id=folder, planner=SavePlanner(), process_group=ranks.group)


def load_sharded(
    path: AnyPath, columns: int | None = None, *, device: str | torch.device = "cpu", group: Group = None
) -> MemoryState:
    """Load this rank's columns of what :func:`save_sharded` wrote, on any number of ranks.

    Args:
        path: the folder.
        columns: how many of them this rank takes, after those of the ranks before it; None for those that
            :func:`torch.chunk` would give it. All ranks together take all columns.
        device: where the state goes.
        group: as in :func:`write_sharded`.

    What is wrong on one rank is raised on every rank.

    Raises:
        TypeError, ValueError: the folder holds something else than one state, or the columns do not add up.
        torch.distributed.checkpoint.CheckpointException, OSError: some rank cannot read.
    """
    ranks = Ranks("load_sharded", group)

    def share() -> Share:
        folder = os.fsdecode(path)
        tensors = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        mean, cov = (tensors.get(name) for name in MemoryState._fields)
        if not isinstance(mean, TensorStorageMetadata) or not isinstance(cov, TensorStorageMetadata):
            raise ValueError(f"{folder} holds no memory state: it must hold mean and cov, it holds {sorted(tensors)}")
        (batch, rows, total), dtype = mean.size, mean.properties.dtype
        mine = _chunk(total, ranks) if columns is None else guards.count("columns", columns, least=0)
        made = torch.empty(batch, rows, mine, dtype=dtype, device=device)
        facts = {"B": batch, "K": rows, "C": total}
        return Share(facts, dtype, mine, (folder, total, made, made.new_empty(cov.size)))

    folder, total, mean, cov = ranks.attempt(share)
    if sum(ranks.columns) != total:
        raise ValueError(f"columns of all ranks must add up to {total}, got {ranks.columns}")
    parts = {"mean": Columns(mean, ranks.columns, ranks.rank), "cov": cov}
    dcp.load(parts, checkpoint_id=folder, planner=LoadPlanner(), process_group=ranks.group)
    return MemoryState(mean, cov)


def _chunk(total: int, ranks: Ranks) -> int:
    """The columns of this rank when each takes as many as the first, as far as there are any left."""
    width = -(-total // ranks.size)
    return max(0, min(width, total - ranks.rank * width))


class Columns:
    """The columns of a mean that one rank holds, as torch.distributed.checkpoint asks for a part of a tensor.

    The methods are those of its protocol ``_Checkpointable``. A DTensor knows shards of equal size only.
    """

    def __init__(self, part: Tensor, columns: list[int], rank: int) -> None:
        self.part = part  # [B, K, columns[rank]]
        self.offsets = torch.Size((0, 0, sum(columns[:rank])))
        self.whole = torch.Size((*part.shape[:2], sum(columns)))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=self.offsets, sizes=self.part.shape)] if self.part.numel() else []

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.part)
        return [
            WriteItem(
                index=MetadataIndex(name, self.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.whole),
            )
            for chunk in self.__create_chunk_list__()
        ]


class SavePlanner(DefaultSavePlanner):
    """Finds the tensor behind :class:`Columns`."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.part if isinstance(found, Columns) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """Finds the tensor behind :class:`Columns`, and takes names and parts as they are."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.part if isinstance(found, Columns) else super().lookup_tensor(index)
