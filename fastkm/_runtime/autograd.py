"""An operator as a function with a gradient, under autograd, torch.func and torch.compile; written once for all.

The operators themselves carry no gradient, so a call that wants none costs nothing: no ``autograd.Function`` is entered
and nothing is saved. Where a gradient is wanted, it is attached to what the operator returned.
"""

from collections.abc import Callable, Sequence
from types import new_class

import torch
from torch import Tensor

from fastkm._runtime.guards import spread_variance
from fastkm._runtime.second_derivatives import gradient_of_gradient
from fastkm._runtime.torch_private import (
    OpOverload,
    argument_names,
    is_transformed,
    short_name,
    without_python_frame,
)

# A forward operator takes these numbers with trailing axes missing, its backward does not: how many axes the backward
# takes, and the argument that has the same leading axes.
VARIANCE_AXES = {
    "noise_var": ("values", 2),
    "old_noise_var": ("values", 2),
    "ridge": ("mean", 1),
    "retention": ("values", 2),
    "prior_var": ("mean", 1),
    "forgetting": ("values", 2),
}


class Differentiable:
    """An operator with its gradient: called like the operator. Made by :func:`differentiable`.

    ``operator`` is the operator alone, without a gradient. ``attach(outputs, inputs)`` gives the outputs that the
    operator computed from the inputs their gradient.
    """

    def __init__(self, operator: OpOverload, pull_back: Callable, keep: tuple[int, ...]) -> None:
        self.operator: Callable = without_python_frame(operator)
        name, variances = short_name(operator), _variances_of(operator)
        self.run, self.attach = _run_and_attach(operator, name, variances, pull_back, keep)

    def __call__(self, *inputs):
        return self.run(*inputs)


def differentiable(
    operator: OpOverload, backward: OpOverload, arguments: Callable | None = None, *, keep: tuple[int, ...] = ()
) -> Differentiable:
    """``operator`` with the gradient that ``backward`` computes, and the derivatives of that gradient.

    By convention ``backward(*inputs, *kept, *cotangents)`` takes the inputs of ``operator``, the outputs at the
    positions ``keep``, and a cotangent, or None for zero, of every output but the last, which is the status. It returns
    the gradients of the leading inputs. ``arguments`` maps these to the arguments of a ``backward`` that differs.

    Second and further derivatives are those of the reference form, see :mod:`fastkm._runtime.second_derivatives`.
    """

    def run_backward(*known_and_cotangents):
        return backward(*(arguments(*known_and_cotangents) if arguments else known_and_cotangents))

    second = gradient_of_gradient(operator, backward)
    gradient, _ = _run_and_attach(run_backward, short_name(backward), [], second, ())

    def pull_back(*known_and_cotangents):
        return gradient(*known_and_cotangents[:-1])  # the last cotangent is that of the status

    return Differentiable(operator, pull_back, keep)


def without_gradient(operator: OpOverload) -> Differentiable:
    """``operator``, for inputs that require no gradient, under torch.func and torch.compile as well."""
    return Differentiable(operator, lambda *known_and_cotangents: (), ())


def wants_gradient(inputs: Sequence) -> bool:
    if torch.is_grad_enabled():
        for x in inputs:  # a loop, because a generator costs a microsecond
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def _variances_of(operator: OpOverload) -> list[tuple[int, int, int]]:
    """The position of each variance, of the argument with the same leading axes, and how many axes these are."""
    names = argument_names(operator)
    return [
        (names.index(variance), names.index(like), axes)
        for variance, (like, axes) in VARIANCE_AXES.items()
        if variance in names and like in names  # a library of another version may name them otherwise
    ]


def _run_and_attach(
    operator: Callable, name: str, variances: list, pull_back: Callable, keep: tuple[int, ...]
) -> tuple[Callable, Callable]:
    """``run`` and ``attach`` of a :class:`Differentiable`, with gradients ``pull_back(*inputs, *kept, *cotangents)``.

    Both are functions, not methods: torch.compile traces a function that a backward refers to, but not an object. For
    the same reason ``keep`` holds numbers: up to torch 2.11 a slice cannot be traced.
    """

    def run(*inputs):
        if not (wants_gradient(inputs) or is_transformed()):
            return operator(*inputs)
        if torch.compiler.is_compiling() or is_transformed():
            return whole.apply(*inputs)
        with torch.no_grad():
            outputs = operator(*inputs)
        return attach(outputs, inputs)

    def attach(outputs, inputs: Sequence):
        inputs = list(inputs)
        for variance, like, axes in variances:
            if inputs[variance] is not None and inputs[variance].dim() < axes:
                inputs[variance] = spread_variance(inputs[variance], inputs[like].shape[:axes])
        attached = computed.apply(_as_tuple(outputs), *inputs)
        return attached if isinstance(outputs, tuple) else attached[0]

    whole, computed = _autograd_functions(operator, name, pull_back, keep, run)
    return run, attach


def _autograd_functions(
    operator: Callable, name: str, pull_back: Callable, keep: tuple[int, ...], run: Callable
) -> tuple:
    """Two functions of autograd with the gradients ``pull_back(*inputs, *kept, *cotangents)``.

    The first computes the outputs, in the two halves that torch.func and torch.compile ask for. The second takes
    outputs that are computed already; all other calls enter it, because PyTorch inspects the signature of the first
    at every call, which takes as long as a small kernel. ``run`` is the operator with its gradient, for vmap.
    """

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            outputs = _as_tuple(outputs)
            known = (*inputs, *[outputs[position] for position in keep])
            ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in known])
            ctx.plain = [None if isinstance(x, Tensor) else x for x in known]
            ctx.num_inputs = len(inputs)
            if not torch.compiler.is_compiling():  # the compiler materialises cotangents and does not trace this call
                ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *cotangents):
            if all([x is None for x in cotangents]):
                return (None,) * ctx.num_inputs
            known = [plain if x is None else x for x, plain in zip(ctx.saved_tensors, ctx.plain, strict=True)]
            gradients = _as_tuple(pull_back(*known, *cotangents))
            gradients = [x if isinstance(of, Tensor) else None for x, of in zip(gradients, known, strict=False)]
            return (*gradients, *[None] * (ctx.num_inputs - len(gradients)))

        @staticmethod
        def vmap(info, in_dims, *inputs):
            return _fold_into_batch(run, info, in_dims, *inputs)

    class Computed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, outputs, *inputs):
            Whole.setup_context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *cotangents):
            return (None, *Whole.backward(ctx, *cotangents))

    return new_class(name, (Whole,)), new_class(name, (Computed,))  # the graph of autograd shows the name


def _fold_into_batch(run: Callable, info, in_dims: tuple, *inputs):
    """Every operator is batch first, so the axis of a vmap becomes part of B, and is split off again."""

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
