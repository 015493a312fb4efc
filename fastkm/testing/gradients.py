"""Forward and backward of an operation as one computation: the gradients of ½ Σ ‖output‖² by its inputs.

The cotangent of every output is the output itself, so no time goes into the functional.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastkm import MemoryState
from fastkm.testing.definitions import Result
from fastkm.testing.episodes import Episode


class Inputs(NamedTuple):
    """The fields of an episode by which an operation is differentiated."""

    memory: str  # a :class:`fastkm.MemoryState`
    tensors: tuple[str, ...]


def gradient_of(form: Callable[..., Result], inputs: Inputs) -> Callable[..., Result]:
    """``form`` followed by its backward: the gradients by ``mean``, ``cov`` and the tensors of ``inputs``, by name.

    The gradient by a covariance may have any antisymmetric part; see :func:`symmetric`.
    """

    def run(episode: Episode, *backend: str, **options: Any) -> Result:
        state = MemoryState(*(x.detach().requires_grad_() for x in getattr(episode, inputs.memory)))
        others = {name: getattr(episode, name).detach().requires_grad_() for name in inputs.tensors}
        changed: dict[str, Any] = {inputs.memory: state, **others}
        result = form(episode._replace(**changed), *backend, **options)
        outputs = [x for x in result.values() if x.requires_grad]
        leaves = {**state._asdict(), **others}
        cotangents = [x.detach() for x in outputs]
        found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
        return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}

    return run


def symmetric(gradients: Result) -> Result:
    """Gradients that can be compared: a covariance moves in symmetric directions only."""
    cov = gradients.get("cov")
    return gradients if cov is None else {**gradients, "cov": (cov + cov.mT) / 2}
