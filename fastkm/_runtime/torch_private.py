"""Every private name of PyTorch that the package uses, with the reason. Tried on torch 2.10 to 2.15.

No other module of the package may use a private name of torch, so when a release of torch breaks one of them, this file
is the only one to change. Not listed are the protected methods of ``torch.distributions.Distribution``, which its
subclasses are meant to use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch, _pytree

__all__ = [
    "OpOverload",  # the type of torch.ops.<namespace>.<name>.<overload>, for annotations
    "argument_names",
    "assert_when_run",
    "disable_current_modes",
    "has_kernel",
    "holds_no_value",
    "is_any_autocast_enabled",
    "is_part_of_trace",
    "is_transformed",
    "num_returns",
    "pause_tracing",
    "register_named_tuple",
    "short_name",
    "tracing_state",
    "tree_leaves",
    "tree_map",
    "without_python_frame",
]

# Whether autocast is on for any device. The public torch.is_autocast_enabled(device) must be asked once a device.
is_any_autocast_enabled = torch._C._is_any_autocast_enabled

# Leaves all modes, a FakeTensorMode for example, so that a cached tensor is always a real one.
disable_current_modes = _python_dispatch._disable_current_modes

# The tensors inside the arguments of a call: in tuples, lists, dicts and named tuples.
tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map

_MODES = torch._C._TorchDispatchModeKey

_are_functorch_transforms_active = torch._C._are_functorch_transforms_active

# Not None inside torch.jit.trace. The public torch.jit.is_tracing() asks the same in two more Python calls.
tracing_state = torch._C._get_tracing_state


def is_transformed() -> bool:
    """Inside torch.func or forward mode. No tensor tells whether an outer level maps or differentiates it.

    Neither the stack of torch.func nor the level of forward mode has a public name.
    """
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


@contextmanager
def pause_tracing() -> Iterator[None]:
    """What is computed here is no part of the graph that torch.jit.trace records."""
    state = tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def holds_no_value(value: torch.Tensor) -> bool:
    """Whether ``value`` is a fake tensor, or a mode is active that makes fake tensors or records a graph (make_fx).

    The public torch.compiler.is_compiling() is false in both.
    """
    return (
        isinstance(torch.func.debug_unwrap(value), FakeTensor)
        or torch._C._get_dispatch_mode(_MODES.FAKE) is not None
        or torch._C._get_dispatch_mode(_MODES.PROXY) is not None
    )


def is_part_of_trace(value: torch.Tensor) -> bool:
    """Inside torch.jit.trace: whether ``value`` is an input of what is traced, or may become one of its constants."""
    state = tracing_state()
    try:
        torch._C._get_value_trace(value)  # type: ignore[attr-defined]
    except RuntimeError:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]  # the refusal has ended the trace
        return False
    return True


def register_named_tuple(cls: type, name: str) -> None:
    """Give a named tuple the name by which torch.export writes it to a file."""
    _pytree._register_namedtuple(cls, serialized_type_name=name)


def has_kernel(operator: str, dispatch_key: str) -> bool:
    """Whether ``operator``, written ``namespace::name``, has a kernel for ``dispatch_key``.

    The public way is to call the operator and to see whether it raises NotImplementedError.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, dispatch_key)


def without_python_frame(operator: OpOverload) -> Any:
    """The built-in function behind ``operator``, which saves a Python frame, or ``operator`` if there is none."""
    return getattr(operator, "_op", operator)


def short_name(operator: OpOverload) -> str:
    """The name of an operator without its namespace."""
    return operator._schema.name.partition("::")[2]


def num_returns(operator: OpOverload) -> int:
    """How many tensors the schema of an operator returns."""
    return len(operator._schema.returns)


def argument_names(operator: OpOverload) -> list[str]:
    """Names of the arguments in the schema of an operator."""
    return [argument.name for argument in operator._schema.arguments]


def assert_when_run(condition: torch.Tensor, message: str) -> None:
    """Raise if ``condition`` is false when it is computed, in a graph that is traced or captured now and runs later."""
    torch._assert_async(condition, message)
