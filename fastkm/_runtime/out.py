"""Results that go into a memory of the caller: the argument ``out`` of public functions."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastkm._runtime import dispatch, guards
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.autograd import wants_gradient
from fastkm._runtime.diagnosis import raise_failures
from fastkm._runtime.operation import Operation
from fastkm._runtime.torch_private import is_transformed


@in_float32
def call_into(operation: Operation, backend: str | None, out: Any, *arguments: Any) -> tuple:
    """What :func:`fastkm._runtime.call.call` returns, with the new memory in ``out``, which may be the old one.

    The operation begins with a state, and ``operation.into`` computes it in place on a CPU. Elsewhere, and by the
    reference, the results are computed and then copied. A memory that is refused comes out as it came in.
    """
    inputs = operation.check(arguments)
    mean, cov = check_out(out, inputs, operation)
    backend = dispatch.resolve(operation.name, backend, *[x for x in inputs if isinstance(x, Tensor)])
    with torch.no_grad():
        if backend == "native" and not mean.is_cuda:
            wide = [
                x.to(mean.dtype) if isinstance(x, Tensor) and x.dtype in guards.LOW_PRECISION else x for x in inputs
            ]
            reports = operation.into(*wide[:-1], mean, cov)  # type: ignore[misc]  # a CPU knows no precision
        else:
            reports = _copy_into(operation, backend, inputs, mean, cov)
        if not torch.compiler.is_compiling():
            increment_version((mean, cov))  # autograd notices that what it saved has changed
    raise_failures(reports[-1], operation, inputs)
    return mean, cov, *reports


def _copy_into(operation: Operation, backend: str, inputs: list, mean: Tensor, cov: Tensor) -> tuple:
    if not dispatch.reads_low_precision(backend, mean):
        inputs = _widened(inputs, mean)
    new_mean, new_cov, *reports = operation.kernels[backend](*inputs)
    good = (reports[-1] == 0).view(-1, 1, 1)
    mean.copy_(torch.where(good, new_mean, inputs[0]))
    cov.copy_(torch.where(good, new_cov, inputs[1]))
    return tuple(reports)


def _widened(inputs: list, memory: Tensor) -> list:
    return [x.to(memory.dtype) if isinstance(x, Tensor) and x.dtype in guards.LOW_PRECISION else x for x in inputs]


def check_out(out: object, inputs: list, operation: Operation) -> tuple[Tensor, Tensor]:
    """The two tensors of ``out``, or an error in words before anything is written."""
    if is_transformed():
        raise RuntimeError("out is written in place, which torch.func cannot transform; leave out away")
    signature = guards.Signature()
    signature.state("state", inputs[:2])
    made = signature.state("out", out)
    if wants_gradient(inputs):
        raise RuntimeError(
            f"{operation.name} with out computes no gradient and an argument requires one; leave out away, or call it "
            "under torch.no_grad()"
        )
    for name, x in zip(("out.mean", "out.cov"), made, strict=True):
        if x.requires_grad:
            raise RuntimeError(f"{name} requires a gradient and cannot be overwritten; detach it")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must have contiguous rows, its last axis has stride {x.stride(-1)}")
    if not (torch.compiler.is_compiling() or made[0].is_meta):
        _refuse_overlap(made, zip(operation.input_names(), inputs, strict=True))
    return made


def _refuse_overlap(made: tuple[Tensor, Tensor], given: Iterable[tuple[str, object]]) -> None:
    """``out`` may be the state itself, tensor by tensor, and shares no other memory."""
    own = {"out.mean": "state.mean", "out.cov": "state.cov"}
    others = [(name, x) for name, x in given if isinstance(x, Tensor)]
    for name, x in zip(own, made, strict=True):
        if _overlaps_itself(x):
            raise ValueError(f"{name} has several entries at one place in memory: it is expanded; clone it")
        for other_name, other in (*others, ("out.cov", made[1])):
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
