"""Conditions on values that are not known yet."""

import torch
from torch import Tensor


def is_value_unknown(value: Tensor) -> bool:
    """A graph that is being traced has no values. A graph that is being captured must not wait for them.

    A check of such a value is put into the graph with :func:`fastkm._runtime.torch_private.assert_when_run`.
    """
    return torch.compiler.is_compiling() or (value.is_cuda and torch.cuda.is_current_stream_capturing())
