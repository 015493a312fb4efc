"""The one way into a kernel: every public function ends in :func:`call`.

Most calls are plain: tensors on the CPU, outside every transform, autocast and compilation, for the native backend. A
plain call goes to the compiled operator without a check in Python, because the operator refuses everything that the
checks refuse, before it touches memory. Only when it has refused do the checks run, to say what is wrong in words. This
saves the time of the checks and of the dispatch, 15 to 25 µs a call, of which the README promises to have none.

Every other call is checked first, takes the backend that :func:`fastkm._runtime.dispatch.resolve` names, and has its
status examined. Either way an operation is computed at most once, and no error leads to another backend.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, bfloat16, float16
from torch.compiler import is_compiling
from torch.nn import Parameter

from fastkm._runtime import dispatch, schema
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.autograd import Differentiable
from fastkm._runtime.guards import DTYPES, LOW_PRECISION
from fastkm._runtime.operation import Operation
from fastkm._runtime.status import factorisation_error, raise_failures
from fastkm._runtime.torch_private import disable_current_modes, is_any_autocast_enabled, is_transformed
from fastkm.state import MemoryState

# make_result(ReadResult, (values, weights)) is ReadResult(values, weights) in half the time.
make_result = tuple.__new__


def call(operation: Operation, backend: str | None, *arguments: Any) -> Any:
    """The outputs of ``operation`` for the caller's ``arguments``, computed by ``backend``."""
    plain = plain_inputs(operation, backend, arguments)
    if plain is None:
        return _call_checked(operation, backend, *arguments)
    inputs, wants_gradient = plain
    native: Differentiable = operation.native  # type: ignore[assignment]
    try:
        if wants_gradient:
            with torch.no_grad():
                outputs = native.operator(*inputs)
        else:
            outputs = native.operator(*inputs)
    except RuntimeError as error:
        refusal = error
    else:
        info = outputs[-1]
        if any(info.tolist()):
            raise factorisation_error(info, operation.factored)
        return native.attach(outputs, inputs) if wants_gradient else outputs
    operation.check(arguments)  # raises in words if an argument is wrong
    raise refusal


def plain_inputs(operation: Operation, backend: str | None, arguments: tuple) -> tuple[list, bool] | None:
    """The operator's inputs for a plain call, and whether it wants a gradient; None for any other call.

    Raises nothing, whatever the arguments are. A state stands for its two tensors, a number for a 0-d tensor of the
    memory's dtype, a word for its entry in the table of the operation.
    """
    if is_compiling() or is_any_autocast_enabled() or is_transformed() or schema.unavailable is not None:
        return None
    chosen = dispatch.CHOSEN if backend is None else backend
    if (chosen is not None and chosen != "native") or operation.native is None:
        return None
    inputs: list = []
    wants_gradient = False
    options = 0
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.requires_grad:
                wants_gradient = True
        elif kind is MemoryState:
            mean, value = value
            if not (isinstance(mean, Tensor) and isinstance(value, Tensor)):
                return None
            if mean.requires_grad or value.requires_grad:
                wants_gradient = True
            inputs.append(mean)
        elif kind is str:
            table = operation.words.get(len(inputs))
            value = table.get(value) if table else None
            if value is None:
                return None
            options += 1
        elif kind is int and len(inputs) in operation.counts:
            options += 1
        elif kind is float or kind is int:
            value = number_as_tensor(value, inputs[0].dtype) if inputs else None
            if value is None:
                return None
        elif value is not None:
            return None
        inputs.append(value)
    if options != operation.num_options:  # an option that is a tensor, or None
        return None
    for position in operation.codes:
        codes = inputs[position]
        if codes is None or (dtype := codes.dtype) is bfloat16 or dtype is float16:
            return None
    if inputs[0] is None or not inputs[0].is_cpu:  # the operator refuses tensors elsewhere than the first
        return None
    if wants_gradient and torch.is_grad_enabled():
        if dispatch.CAPABILITIES[operation.name]["native"].gradients:
            return inputs, True
        return None
    return inputs, False


@lru_cache(maxsize=64)
def number_as_tensor(value: float, dtype: torch.dtype) -> Tensor | None:
    """A number as a 0-d tensor that nobody writes to. None if ``dtype`` cannot hold it as a positive number."""
    if dtype not in DTYPES or not torch.finfo(dtype).tiny <= value <= torch.finfo(dtype).max:
        return None
    with disable_current_modes(), torch.inference_mode(False):  # it outlives the mode of its first call
        return torch.full((), value, dtype=dtype, device="cpu")


@in_float32
def _call_checked(operation: Operation, backend: str | None, *arguments: Any) -> Any:
    inputs = operation.check(arguments)
    memory = inputs[0]
    backend = dispatch.resolve(operation.name, backend, *[x for x in inputs if isinstance(x, Tensor)])
    if not dispatch.reads_low_precision(backend, memory):
        inputs = [x.to(memory.dtype) if isinstance(x, Tensor) and x.dtype in LOW_PRECISION else x for x in inputs]
    outputs = operation.kernels[backend](*inputs)
    if operation.factored:
        raise_failures(outputs[-1], operation.factored)
    return outputs
