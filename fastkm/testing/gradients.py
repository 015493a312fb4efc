"""The gradient of an operation as an operation of its own: forward and backward of ½ Σ ‖output‖².

The cotangent of every output is the output itself, so no time goes into the functional.
"""

from collections.abc import Callable

import torch

from fastkm import MemoryState
from fastkm.testing.episodes import Episode
from fastkm.testing.operations import OPERATIONS, Operation, Result

GRADIENT = " + ∇"

# operation -> the memory it takes from an episode, and the other tensors it is differentiated by
INPUTS = {
    "update_posterior": ("prior", ("weights", "values", "noise_var")),
    "write": ("prior", ("values", "noise_var", "ridge")),
    "read": ("written", ("queries", "ridge")),
}


def gradient_of(form: Callable[..., Result], operation: str) -> Callable[..., Result]:
    """``form`` followed by its backward: the gradients by every tensor the operation takes, by name.

    That by a covariance may have any antisymmetric part; see :func:`symmetric`.
    """
    state_field, fields = INPUTS[operation]

    def run(episode: Episode, *backend: str, **options) -> Result:
        state = MemoryState(*(x.detach().requires_grad_() for x in getattr(episode, state_field)))
        others = {name: getattr(episode, name).detach().requires_grad_() for name in fields}
        result = form(episode._replace(**{state_field: state}, **others), *backend, **options)
        outputs = [x for x in result.values() if x.requires_grad]
        leaves = {**state._asdict(), **others}
        found = torch.autograd.grad(outputs, leaves.values(), [x.detach() for x in outputs], allow_unused=True)
        return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}

    return run


def symmetric(gradients: Result) -> Result:
    """Gradients that can be compared: a covariance moves in symmetric directions only."""
    cov = gradients.get("cov")
    return gradients if cov is None else {**gradients, "cov": (cov + cov.mT) / 2}


def with_gradient(operation: str) -> Operation:
    op = OPERATIONS[operation]

    def of(form: Callable[[Episode], Result]) -> Callable[[Episode], Result]:
        form = gradient_of(form, operation)
        return lambda episode: symmetric(form(episode))

    return Operation(
        gradient_of(op.run, operation),
        of(op.definition),
        of(op.other),
        op.unit,
        None if op.loop is None else gradient_of(op.definition, operation),
        symmetric,
    )


ALL = OPERATIONS | {operation + GRADIENT: with_gradient(operation) for operation in INPUTS}
