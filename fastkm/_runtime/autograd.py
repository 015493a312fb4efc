"""An operator as a function with a gradient, under autograd, torch.func and torch.compile; written once for all.

The operators themselves carry no gradient, so that a call that wants none costs nothing: no ``autograd.Function`` is
entered and nothing is saved. Where one is wanted it is attached to what the operator returned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._ops import OpOverload
from torch.autograd import forward_ad

from fastkm._runtime import guards

# Variances that an operator takes with trailing axes missing and its backward does not: how many axes, and whose.
SPREAD = {"noise_var": ("values", 2), "ridge": ("mean", 1)}


@dataclass
class Differentiable:
    """Called, it is the operator with its gradient."""

    operator: Callable
    name: str
    run: Callable
    attach: Callable  # (outputs, inputs) -> the outputs that the operator computed from the inputs, with their gradient

    def __call__(self, *inputs):
        return self.run(*inputs)


def differentiable(
    operator: OpOverload, backward: OpOverload, arguments: Callable | None = None, *, keep: slice = slice(0)
) -> Differentiable:
    """``operator`` with the gradient that ``backward`` computes.

    By convention ``backward(*inputs, *kept, *cotangents)`` takes the inputs of ``operator``, the outputs it asks to
    ``keep``, and a cotangent, or None for zero, of every output but the last, which is the status. It returns the
    gradients of the leading inputs. ``arguments`` maps these to the arguments of a ``backward`` that differs.

    A second derivative raises: ``backward`` has none.
    """
    gradient, _ = _functions(backward, partial(_no_second_derivative, operator), slice(0))

    def pull_back(*known_and_cotangents):
        known_and_cotangents = known_and_cotangents[:-1]  # the last is the status's
        return gradient(*(arguments(*known_and_cotangents) if arguments else known_and_cotangents))

    bare = getattr(operator, "_op", operator)  # without the frame in Python around it
    return Differentiable(bare, _name(operator), *_functions(operator, pull_back, keep))


def wants_gradient(inputs: Sequence) -> bool:
    if torch.is_grad_enabled():
        for x in inputs:  # a loop: every call passes here, and a generator costs a microsecond
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def transformed() -> bool:
    """Inside torch.func or forward mode, where no tensor tells whether an outer level maps or differentiates it."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def _functions(operator: OpOverload, pull_back: Callable, keep: slice) -> tuple[Callable, Callable]:
    """``run`` and ``attach`` of a :class:`Differentiable` with gradients ``pull_back(*inputs, *kept, *cotangents)``.

    There is an ``autograd.Function`` that computes, in the two halves that torch.func and torch.compile ask for, and
    one for outputs that have been computed, which all other calls enter: PyTorch inspects the signature of the first
    anew at every call, which takes as long as a small kernel.
    """

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            outputs = _as_tuple(outputs)
            known = (*inputs, *outputs[keep])
            ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in known])
            ctx.plain = [None if isinstance(x, Tensor) else x for x in known]
            ctx.num_inputs = len(inputs)
            if not torch.compiler.is_compiling():  # which materialises every cotangent, and does not trace this
                ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *cotangents):
            if all([x is None for x in cotangents]):
                return (None,) * ctx.num_inputs
            known = [plain if x is None else x for x, plain in zip(ctx.saved_tensors, ctx.plain, strict=True)]
            gradients = _as_tuple(pull_back(*known, *cotangents))
            return (*gradients, *[None] * (ctx.num_inputs - len(gradients)))

        @staticmethod
        def vmap(info, in_dims, *inputs):
            return _fold(run, info, in_dims, *inputs)

    class Computed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, outputs, *inputs):
            Whole.setup_context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *cotangents):
            return (None, *Whole.backward(ctx, *cotangents))

    whole, computed = (type(_name(operator), (function,), {}) for function in (Whole, Computed))  # so says the graph
    names = [argument.name for argument in operator._schema.arguments]
    spread = [(names.index(x), names.index(like), axes) for x, (like, axes) in SPREAD.items() if x in names]

    def run(*inputs):
        if not (wants_gradient(inputs) or transformed()):
            return operator(*inputs)
        if torch.compiler.is_compiling() or transformed():
            return whole.apply(*inputs)
        with torch.no_grad():
            outputs = operator(*inputs)
        return attach(outputs, inputs)

    def attach(outputs, inputs):
        inputs = list(inputs)
        for i, like, axes in spread:
            x = inputs[i]
            if x.dim() < axes:
                inputs[i] = guards.spread(x, inputs[like].shape[:axes])
        attached = computed.apply(_as_tuple(outputs), *inputs)
        return attached if isinstance(outputs, tuple) else attached[0]

    return run, attach


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
