"""The derivative of a gradient that a kernel computed: PyTorch differentiates the reference form.

A kernel computes the outputs, and another one their gradient ``Jᵀc``. The derivative of that gradient along ``v`` is
the gradient of ``⟨Jᵀc, v⟩`` for the inputs and for ``c``. No kernel computes it: PyTorch takes it of the reference
form, in the time and the memory of the reference. It can be differentiated again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastkm._runtime.torch_private import OpOverload, argument_names, num_returns, short_name

COVARIANCES = ("cov", "prior_cov")

# The reference form of each operator, by the name of the operator without its namespace. Every
# :class:`fastkm._runtime.operation.Operation` enters its own.
REFERENCES: dict[str, Callable] = {}


def gradient_of_gradient(operator: OpOverload, backward: OpOverload) -> Callable:
    """What pulls cotangents of the gradient back to the inputs of ``operator`` and to the cotangents of its outputs.

    The function returned takes ``(*inputs, *kept, *cotangents, *directions)``. ``cotangents`` are those of the outputs
    of ``operator`` without the status, ``directions`` those of the gradients that ``backward`` returns; None is zero.
    It returns a gradient, or None, for each of ``(*inputs, *kept, *cotangents)``. ``kept`` outputs are functions of the
    inputs, so their share is part of that of the inputs.
    """
    name, names = short_name(operator), argument_names(operator)
    num_inputs = len(names)
    num_outputs = num_returns(operator) - 1  # without the status
    num_gradients = num_returns(backward)
    covariances = [i for i, name in enumerate(names[:num_gradients]) if name in COVARIANCES]

    def pull_back(*arguments):
        known, directions = arguments[:-num_gradients], arguments[-num_gradients:]
        inputs, cotangents = known[:num_inputs], known[len(known) - num_outputs :]
        present = [i for i, x in enumerate(inputs[:num_gradients]) if x is not None]  # an argument may be missing
        leading = [inputs[i] for i in present]
        given = [i for i, x in enumerate(cotangents) if x is not None]

        def outputs_of(*leading):
            full = list(inputs)
            for i, x in zip(present, leading, strict=True):
                full[i] = x.to(leading[0].dtype)  # codes may be of low precision
            for i in covariances:  # the gradient of a kernel is that of a symmetric matrix
                full[i] = (full[i] + full[i].mT) / 2
            outputs = REFERENCES[name](*full)
            return tuple(outputs[i] for i in given)

        def gradients_of(leading, cotangents):
            return torch.func.vjp(outputs_of, *leading)[1](cotangents)

        _, pull = torch.func.vjp(gradients_of, tuple(leading), tuple(cotangents[i] for i in given))
        to_leading, to_given = pull(tuple(_or_zeros(directions[i], inputs[i]) for i in present))
        to_inputs = dict(zip(present, to_leading, strict=True))
        to_cotangents = dict(zip(given, to_given, strict=True))
        unused = len(known) - num_gradients - num_outputs  # options and kept outputs
        return (
            *map(to_inputs.get, range(num_gradients)),
            *[None] * unused,
            *map(to_cotangents.get, range(num_outputs)),
        )

    return pull_back


def _or_zeros(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x
