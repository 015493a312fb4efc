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
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from fastkm._runtime import dispatch, schema
from fastkm._runtime.arguments import CODES, INTEGER, VALUE
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
    memory = arguments[0]
    if type(memory) is MemoryState:
        memory = memory[0]
    if type(memory) not in TENSORS or not memory.is_cpu:  # the operator refuses the others if they are elsewhere
        return None
    dtype = memory.dtype
    inputs: list = []
    wants_gradient = False
    for value, role in zip(arguments, operation.roles):  # noqa: B905  strict costs time; call has as many as roles
        kind = type(value)
        if role is VALUE or role is CODES:
            if kind is MemoryState:
                mean, value = value
                if type(mean) not in TENSORS or type(value) not in TENSORS:
                    return None
                wants_gradient = wants_gradient or mean.requires_grad or value.requires_grad
                inputs.append(mean)
            elif kind in TENSORS:
                if role is CODES and value.dtype is not dtype:
                    return None
                wants_gradient = wants_gradient or value.requires_grad
            elif kind is float or kind is int:
                value = number_as_tensor(value, dtype)
                if value is None:
                    return None
            elif value is not None:
                return None
        elif role is INTEGER:
            if kind is not int:
                return None
        else:
            value = role.get(value) if kind is str else None
            if value is None:
                return None
        inputs.append(value)
    if wants_gradient:
        wants_gradient = torch.is_grad_enabled()
        if wants_gradient and not dispatch.CAPABILITIES[operation.name]["native"].gradients:
            return None
    return inputs, wants_gradient


TENSORS = (Tensor, Parameter)


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
