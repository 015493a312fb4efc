"""Results that go into a memory of the caller: the argument ``out`` of public functions."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastkm._runtime.arguments import State
from fastkm._runtime.autograd import wants_gradient
from fastkm._runtime.call import call
from fastkm._runtime.operation import Operation
from fastkm._runtime.torch_private import is_transformed
from fastkm.state import MemoryState


class OperationInto(Operation):
    """``operation``, whose first argument is the state, with the memory for the new state as one more argument.

    ``native`` is the compiled operator, which computes in place on a CPU. Elsewhere, and by the reference, the results
    are computed and then copied. It returns what ``operation`` returns without the state. A memory that is refused
    comes out as it came in.
    """

    def __init__(self, operation: Operation, native: Callable[..., Any]) -> None:
        kernels = {name: _copying(kernel) for name, kernel in operation.kernels.items()}
        super().__init__(
            f"{operation.name}_into",
            *operation.arguments,
            State("out"),
            reference=kernels["reference"],
            factored=operation.factored,
        )
        copied = kernels["native"]
        self.kernels |= kernels
        self.kernels["native"] = lambda *inputs: (copied if inputs[0].is_cuda else native)(*inputs)
        self.native = SimpleNamespace(operator=native)  # type: ignore[assignment]  # it has no gradient to attach

    def check(self, given: tuple) -> list:
        inputs = super().check(given)
        check_out(inputs[-2:], inputs[:-2], self.input_names(), self.name.removesuffix("_into"))
        return inputs


def _copying(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def compute_and_copy(*inputs):
        *given, mean, cov = inputs
        new_mean, new_cov, *reports = kernel(*given)
        good = (reports[-1] == 0).view(-1, 1, 1)
        mean.copy_(torch.where(good, new_mean, given[0]))
        cov.copy_(torch.where(good, new_cov, given[1]))
        return tuple(reports)

    return compute_and_copy


def call_into(operation: OperationInto, backend: str | None, out: Any, *arguments: Any) -> tuple[MemoryState, tuple]:
    """``out`` with the new state, and the other results without the status."""
    try:
        reports = call(operation, backend, *arguments, out)
    except torch.linalg.LinAlgError:
        mark_changed(out)  # the memories that were not refused
        raise
    mark_changed(out)
    return (out if type(out) is MemoryState else MemoryState(*out)), reports[:-1]


def mark_changed(tensors: Iterable[Tensor]) -> None:
    """Let autograd notice that what it saved has changed."""
    if not torch.compiler.is_compiling():
        increment_version([x for x in tensors if not x.is_inference()])


def check_out(out: list[Tensor], given: list, names: list[str], function: str) -> None:
    """Refuse an ``out``, whose shapes and dtypes are right, in words before anything is written."""
    if is_transformed():
        raise RuntimeError("out is written in place, which torch.func cannot transform; leave out away")
    if wants_gradient(given):
        raise RuntimeError(
            f"{function} with out computes no gradient and an argument requires one; leave out away, or call it under "
            "torch.no_grad()"
        )
    for name, x in zip(("out.mean", "out.cov"), out, strict=True):
        if wants_gradient((x,)):
            raise RuntimeError(f"{name} requires a gradient and cannot be overwritten; detach it")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must have contiguous rows, its last axis has stride {x.stride(-1)}")
    if not (torch.compiler.is_compiling() or out[0].is_meta):
        _refuse_overlap(out, [*zip(names, (*given, *out), strict=True)])


def _refuse_overlap(out: list[Tensor], arguments: Iterable[tuple[str, object]]) -> None:
    """``out`` may be the state itself, tensor by tensor, and shares no other memory."""
    own = {"out.mean": "state.mean", "out.cov": "state.cov"}
    others = [(name, x) for name, x in arguments if isinstance(x, Tensor)]
    for name, x in zip(own, out, strict=True):
        if _overlaps_itself(x):
            raise ValueError(f"{name} has several entries at one place in memory: it is expanded; clone it")
        for other_name, other in others:
            if other_name == name or not _share_memory(x, other):
                continue
            same = (x.data_ptr(), x.stride()) == (other.data_ptr(), other.stride())
            if not (same and own[name] == other_name):
                wanted = f"it may be {own[name]} itself or a tensor apart"
                raise ValueError(f"{name} shares memory with {other_name}; {wanted}")


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two entries may lie at one place: an axis steps no further than the axes inside it reach."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += stride * (size - 1)
    return False


def _share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether the addresses from the first entry to the last overlap."""
    if not (x.numel() and y.numel()) or x.device != y.device:
        return False
    (begin, end), (other_begin, other_end) = map(_addresses, (x, y))
    return begin < other_end and other_begin < end


def _addresses(x: Tensor) -> tuple[int, int]:
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
