"""The ranks of a group: what they tell each other before they compute together, and sums over them.

A collective waits for every rank. So no rank may leave a call before the others, and none may bring another shape.
Before anything else is sent, the ranks therefore exchange one small message each, a header. It holds what a rank was
called with, and whether it refuses. If something is wrong, every rank knows, and every rank raises.
"""

from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from fastkm._runtime.errors import BackendUnavailableError
from fastkm._runtime.guards import DTYPES, dtype_name

Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | None"

OPERATIONS = (
    "write_sharded",
    "read_sharded",
    "factor_sharded",
    "read_factored_sharded",
    "update_sharded",
    "filter_sharded",
    "update_pooled",
    "merge_memories",
    "save_sharded",
    "load_sharded",
)
# The first numbers of a header. What follows is, for each name that the operation compares, one number.
REFUSED, OPERATION, DTYPE, COLUMNS, COMPARED = range(5)
LENGTH = 20  # numbers of a header, whatever the operation: ranks that call different operations must not hang either
BLOCK = 2**15  # numbers that a checksum multiplies at once

# What arguments, files or the machine of one rank can raise. The first kind that fits an error is raised on all ranks,
# so that LinAlgError and BackendUnavailableError stand before RuntimeError, from which they derive.
REFUSALS = (
    TypeError,
    ValueError,
    BackendUnavailableError,
    torch.linalg.LinAlgError,
    RuntimeError,  # of PyTorch: a device that is not there, memory of a device, shapes of tensors
    AssertionError,  # of PyTorch without CUDA, of a tensor on a GPU
    MemoryError,
    OSError,
    EOFError,  # of a file that was cut short, as the next
    UnpicklingError,
)


class Share(NamedTuple):
    """A rank's share of the work of a call."""

    facts: Mapping[str, Any]  # numbers, tensors or None: what every rank must hold alike, by name
    dtype: torch.dtype | None
    columns: int  # of this rank
    made: Any


class Ranks:
    """The processes that compute one call together."""

    def __init__(self, operation: str, group: Group) -> None:
        self.operation = operation
        self.group = _process_group(group)
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.columns: list[int] = []  # of each rank, once they agree

    def attempt(self, work: Callable[[], Share]) -> Any:
        """What this rank's share of the work makes. If one rank refuses its own, every rank raises, and none waits."""
        try:
            share = work()
            compared = [fact if isinstance(fact, int) else int(checksum(fact)) for fact in share.facts.values()]
        except REFUSALS as error:
            self._agree(Share({}, None, 0, None), [], error)
        else:
            self._agree(share, compared)
            return share.made

    def _agree(self, share: Share, compared: list[int], refusal: Exception | None = None) -> None:
        """Exchange headers. Every rank raises if one refuses, or if two disagree."""
        dtype = 0 if share.dtype is None else 1 + DTYPES.index(share.dtype)
        numbers = [int(refusal is not None), OPERATIONS.index(self.operation), dtype, share.columns, *compared]
        header = torch.tensor(numbers + [0] * (LENGTH - len(numbers)), dtype=torch.int64, device=self._device())
        gathered = [torch.empty_like(header) for _ in range(self.size)]
        dist.all_gather(gathered, header, group=self.group)
        headers = torch.stack(gathered).tolist()
        self._compare("the operation", [OPERATIONS[one[OPERATION]] for one in headers])
        if any(one[REFUSED] for one in headers):
            self._raise_refusals(refusal)
        self._compare("the dtype", [dtype_name(DTYPES[one[DTYPE] - 1]) for one in headers])
        for place, (name, fact) in enumerate(share.facts.items(), start=COMPARED):
            values = [one[place] for one in headers]
            self._compare(name, values if isinstance(fact, int) else [_Content(value) for value in values])
        self.columns = [one[COLUMNS] for one in headers]

    def _device(self) -> torch.device:
        """Where headers are: NCCL has no communication between CPUs."""
        on_gpu = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def _compare(self, name: str, values: list) -> None:
        """Raise on every rank, in the same words, if ``values``, one for each rank, are not all the same."""
        different = dict.fromkeys(values)
        if len(different) == 1:
            return
        held = [f"{value} on {_where(value, values)}" for value in different]
        raise ValueError(f"{self.operation}: {name} must be the same on every rank, got {', '.join(held)}")

    def _raise_refusals(self, refusal: Exception | None) -> None:
        """Tell every rank in words what the ranks that refuse have to say."""
        words = None if refusal is None else f"{_name(_kind_of(refusal))}: {refusal}"
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, words, group=self.group)
        different = dict.fromkeys(said for said in told if said is not None)
        refusals = [f"refused on {_where(said, told)}, {said}" for said in different]
        kind = next(kind for kind in REFUSALS for said in told if said and said.startswith(_name(kind)))
        raise kind(f"{self.operation}: {'; '.join(refusals)}") from refusal

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """The sums of tensors over all ranks, with one all-reduce; gradients too are summed over the ranks."""
        flat = torch.cat([x.flatten() for x in parts]) if len(parts) > 1 else parts[0].flatten()
        total = SumOverRanks.apply(flat, self.group) if flat.numel() else flat
        return [x.view(part.shape) for x, part in zip(total.split([x.numel() for x in parts]), parts, strict=True)]


class SumOverRanks(torch.autograd.Function):
    """``Σ_r x_r`` on every rank. What is differentiated is the sum of the losses of all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def checksum(x: Tensor | None) -> Tensor | int:
    """One number for the bits of a tensor and their places. It copies a block at a time, and waits for no device."""
    if x is None:
        return 0
    x = x.detach().contiguous().flatten()
    if x.stride(-1) != 1:  # of one number
        x = x.clone(memory_format=torch.contiguous_format)
    bits = x.view(torch.uint8) if x.dtype == torch.bool else x.view(torch.int32)
    within = _factors(0, min(BLOCK, bits.numel()), x.device)
    sums = torch.stack([(block * within[: block.numel()]).sum() for block in bits.split(BLOCK)])
    return 1 + x.numel() + (sums * _factors(BLOCK, BLOCK + sums.numel(), x.device)).sum()


def _factors(first: int, last: int, device: torch.device) -> Tensor:
    """An odd number for each place, modulo 2^64.

    Odd numbers in their order would not do: a sum with them stays the same where two rows move apart by as many places.
    """
    places = torch.arange(first, last, device=device) * 0x1E3779B97F4A7C15
    return (places ^ (places >> 29)) * 0x3F58476D1CE4E5B9 | 1


class _Content(int):
    """The checksum of a tensor, as errors show it."""

    def __str__(self) -> str:
        return f"numbers of checksum {self % 2**64:016x}" if self else "None"


def _kind_of(refusal: Exception) -> type[Exception]:
    return next(kind for kind in REFUSALS if isinstance(refusal, kind))


def _name(error: type[Exception]) -> str:
    return error.__name__.lstrip("_")


def _where(value: object, values: list) -> str:
    """The ranks that have ``value``, in words."""
    ranks = [rank for rank, other in enumerate(values) if other == value]
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"


def _process_group(group: Group) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "no process group exists; call torch.distributed.init_process_group first, as torchrun expects"
        )
    if group is None:
        group = dist.group.WORLD
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a DeviceMesh of one dimension, got {group.ndim}; take one of them by its name"
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup that this process is in, a DeviceMesh or None, got {group!r}")
    return group
