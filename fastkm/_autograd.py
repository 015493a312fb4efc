"""An operator as a function with a gradient, under autograd, torch.func and torch.compile; written once for all.

The operators themselves carry no gradient, so that a call that wants none costs nothing. Such a call goes straight to
the operator: no ``autograd.Function`` is entered and nothing is saved.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad


def differentiable(
    operator: OpOverload, backward: OpOverload, arguments: Callable | None = None, *, keep: slice = slice(0)
) -> Callable:
    """``operator`` with the gradient that ``backward`` computes.

    By convention ``backward(*inputs, *kept, *cotangents)`` takes the inputs of ``operator``, the outputs it asks to
    ``keep``, and a cotangent, or None for zero, of every output but the last, which is the status. It returns the
    gradients of the leading inputs. ``arguments`` maps these to the arguments of a ``backward`` that differs.

    A second derivative raises: ``backward`` has none.
    """
    gradient = _function(backward, partial(_no_second_derivative, operator), slice(0))

    def pull_back(*known_and_cotangents):
        known_and_cotangents = known_and_cotangents[:-1]  # the last is the status's
        return gradient(*(arguments(*known_and_cotangents) if arguments else known_and_cotangents))

    return _function(operator, pull_back, keep)


def wants_gradient(inputs: Sequence) -> bool:
    if torch.is_grad_enabled():
        for x in inputs:  # a loop: every call passes here, and a generator costs a microsecond
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def transformed() -> bool:
    """Inside torch.func or forward mode, where no tensor tells whether an outer level maps or differentiates it."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _function(operator: OpOverload, pull_back: Callable, keep: slice) -> Callable:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            outputs = _as_tuple(outputs)
            known = (*inputs, *outputs[keep])
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in known))
            ctx.plain = tuple(None if isinstance(x, Tensor) else x for x in known)
            ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))
            if not torch.compiler.is_compiling():  # which materialises every cotangent, and does not trace this
                ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *cotangents):
            needed = ctx.needs_input_grad
            if all(x is None for x in cotangents):
                return (None,) * len(needed)
            known = [plain if x is None else x for x, plain in zip(ctx.saved_tensors, ctx.plain, strict=True)]
            gradients = _as_tuple(pull_back(*known, *cotangents))
            gradients += (None,) * (len(needed) - len(gradients))
            return tuple(x if need else None for x, need in zip(gradients, needed, strict=True))

        @staticmethod
        def vmap(info, in_dims, *inputs):
            return _fold(run, info, in_dims, *inputs)

    named = type(_name(operator), (Function,), {})  # so the graph says writeBackward

    def run(*inputs):
        return named.apply(*inputs) if wants_gradient(inputs) or transformed() else operator(*inputs)

    return run


def _no_second_derivative(operator: OpOverload, *_):
    backend = "triton" if operator._schema.name.startswith("fastkm_triton::") else "native"
    raise NotImplementedError(
        f"{_name(operator)} has no second derivative on the {backend} backend; take backend='reference'"
    )


def _name(operator: OpOverload) -> str:
    return operator._schema.name.partition("::")[2]


def _fold(run: Callable, info, in_dims: tuple, *inputs):
    """Every operator is batch first, so the axis of a vmap goes into B, and comes out of it again."""

    def fold(x, dim):
        if not isinstance(x, Tensor):
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    outputs = run(*map(fold, inputs, in_dims))
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (info.batch_size, -1)), 0
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * len(outputs)


def _as_tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)
