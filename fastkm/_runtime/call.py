"""The one way into a kernel: every public function ends in :func:`call`.

Most calls are plain: tensors on the CPU, outside every transform, autocast and compilation, for the native backend. A
plain call goes to the compiled operator without a check in Python. The operator refuses everything that the
checks refuse before it touches memory, but not in words; so when it has refused, the checks run and say what is wrong.
This saves the time of the checks and of the dispatch; ``make bench-full`` prints what a call costs beyond its operator.

Every other call is checked first, takes the backend that :func:`fastkm._runtime.dispatch.resolve` names, and has its
status examined. Either way an operation is computed at most once, and no error leads to another backend.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, bfloat16, float16
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from fastkm._runtime import dispatch, schema
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.diagnosis import factorisation_error, raise_failures
from fastkm._runtime.guards import DTYPES, LOW_PRECISION
from fastkm._runtime.operation import Operation
from fastkm._runtime.torch_private import (
    disable_current_modes,
    is_any_autocast_enabled,
    is_transformed,
    pause_tracing,
)
from fastkm.state import MemoryState

TENSORS = (Tensor, Parameter)

# make_result(ReadResult, (values, weights)) is ReadResult(values, weights) in half the time.
make_result = tuple.__new__


def call(operation: Operation, backend: str | None, *arguments: Any) -> Any:
    """The outputs of ``operation`` for the caller's ``arguments``, computed by ``backend``.

    Trailing arguments that are None may be left out, which saves their time.

    The first part of this function decides whether the call is plain; it raises nothing, whatever the arguments are. It
    makes the operator's inputs on the way: a state stands for its two tensors, a number for a 0-d tensor of the
    memory's dtype, a word for its entry in the table of the operation. It stands here, and not in a function of its
    own, because one more Python call shows in the time of a small call.
    """
    native = operation.native
    chosen = dispatch.CHOSEN if backend is None else backend
    if native is None or (chosen is not None and chosen != "native") or schema.unavailable is not None:
        return _call_checked(operation, backend, *arguments)
    if is_dynamo_compiling() or is_any_autocast_enabled() or is_transformed():
        return _call_checked(operation, backend, *arguments)
    inputs: list = []
    wants_gradient = False
    num_options = 0
    for value in arguments:
        kind = type(value)
        if kind is Tensor:
            if value.requires_grad:
                wants_gradient = True
        elif kind is float and inputs:
            value = number_as_tensor(value, inputs[0].dtype)
            if value is None:
                return _call_checked(operation, backend, *arguments)
        elif kind is str and len(inputs) in operation.words:
            value = operation.words[len(inputs)].get(value)
            if value is None:
                return _call_checked(operation, backend, *arguments)
            num_options += 1
        elif kind is int and len(inputs) in operation.counts:
            num_options += 1
        elif kind is MemoryState:
            mean, value = value
            if type(mean) not in TENSORS or type(value) not in TENSORS:
                return _call_checked(operation, backend, *arguments)
            if mean.requires_grad or value.requires_grad:
                wants_gradient = True
            inputs.append(mean)
        elif kind is Parameter:
            if value.requires_grad:
                wants_gradient = True
        elif value is not None or not inputs:
            return _call_checked(operation, backend, *arguments)
        inputs.append(value)
    if not inputs[0].is_cpu or num_options != operation.num_options:  # the operator refuses tensors of two devices
        return _call_checked(operation, backend, *arguments)
    for position in operation.codes_to_widen:
        codes = inputs[position]
        if codes is not None and ((dtype := codes.dtype) is bfloat16 or dtype is float16):
            return _call_checked(operation, backend, *arguments)
    wants_gradient = wants_gradient and torch.is_grad_enabled()
    if wants_gradient and not dispatch.CAPABILITIES[operation.name]["native"].gradients:
        return _call_checked(operation, backend, *arguments)

    try:
        if wants_gradient:
            with torch.no_grad():
                outputs = native.operator(*inputs)
        else:
            outputs = native.operator(*inputs)
    except (RuntimeError, OverflowError):
        operation.raise_in_words(arguments)
        raise
    info = outputs[-1]
    try:
        failed = any(info.tolist())
    except RuntimeError:  # make_fx records the call and has no value to give; its graph asserts that none failed
        failed = False
        raise_failures(info, operation, inputs)
    if failed:
        raise factorisation_error(info, operation, inputs)
    if not wants_gradient:
        return outputs
    inputs.extend([None] * (operation.num_inputs - len(inputs)))
    return native.attach(outputs, inputs)


@lru_cache(maxsize=64)
def number_as_tensor(value: float, dtype: torch.dtype) -> Tensor | None:
    """A number as a 0-d tensor that nobody writes to. None if ``dtype`` cannot hold it as a positive number."""
    if dtype not in DTYPES or not torch.finfo(dtype).tiny <= value <= torch.finfo(dtype).max:
        return None
    # It outlives the modes of the first call.
    with disable_current_modes(), pause_tracing(), torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device="cpu")


@in_float32
def _call_checked(operation: Operation, backend: str | None, *arguments: Any) -> Any:
    inputs = operation.check(arguments)
    memory = inputs[0]
    backend = dispatch.resolve(operation.name, backend, *[x for x in inputs if isinstance(x, Tensor)])
    if not dispatch.reads_low_precision(operation.name, backend, memory.device.type):
        inputs = [x.to(memory.dtype) if isinstance(x, Tensor) and x.dtype in LOW_PRECISION else x for x in inputs]
    outputs = operation.kernels[backend](*inputs)
    if operation.factored:
        raise_failures(outputs[-1], operation, inputs)
    return outputs
