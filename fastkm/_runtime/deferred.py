"""Conditions on values that are not known yet."""

import warnings

import torch
from torch import Tensor

from fastkm._runtime.torch_private import assert_when_run, holds_no_value, is_part_of_trace, tracing_state

# torch.jit.trace warns where a program branches on sizes. Here only checks do, and PyTorch's own are exempt likewise.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"fastkm\.")


def is_value_unknown(value: Tensor) -> bool:
    """Whether nobody may ask what ``value`` holds; the one place that says so.

    Meta and fake tensors hold no values. A graph that is being compiled, exported or traced has none yet. A graph that
    is being captured on a GPU must not wait for them.
    """
    return (
        torch.compiler.is_compiling()
        or value.is_meta
        or tracing_state() is not None
        or (value.is_cuda and torch.cuda.is_current_stream_capturing())
        or holds_no_value(value)
    )


def assert_later(condition: Tensor, message: str) -> None:
    """Put into the graph that ``condition``, whose value is unknown, must be true when the graph runs.

    torch.jit.trace drops what returns nothing, so it is asked for no assertion: a traced function checks no values.
    """
    if torch.compiler.is_compiling() or not (condition.is_meta or tracing_state() is not None):
        assert_when_run(condition, message)


def is_false_everywhere(condition: Tensor) -> bool:
    """Whether ``condition`` is known to be false everywhere: then a loop may stop."""
    return not (is_value_unknown(condition) or known(condition).any())


def usable_in_trace(parameter: Tensor) -> Tensor:
    """A parameter as torch.jit.trace takes it where no gradient is wanted.

    A trace refuses a tensor that requires a gradient and is no part of what is traced; it gets the values alone.
    """
    if tracing_state() is None or torch.is_grad_enabled() or is_part_of_trace(parameter):
        return parameter
    return parameter.data


def known(value: Tensor) -> Tensor:
    """What ``value`` holds, behind the wrappers of torch.func, without a gradient."""
    return torch.func.debug_unwrap(value).detach()
