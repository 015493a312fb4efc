"""What every operation does with a rank's share: check it as one process would, and prepare it for a sum."""

import torch
from torch import Tensor

from fastkm._runtime import dispatch, status
from fastkm._runtime.operation import Operation

# On the way back a sum over ranks waits for every rank too.
GRADIENT = "whether a gradient is wanted"


def checked(operation: Operation, backend: str | None, arguments: tuple) -> list:
    """What the operators take for a rank's ``arguments``, or an error in words, as the function of one process."""
    inputs = operation.check(arguments)
    dispatch.resolve(operation.name, backend, *[x for x in inputs if isinstance(x, Tensor)])
    return inputs


def finite(product: Tensor, names: str) -> Tensor:
    """``product``, or an error that names the memories [B] in which it is not finite."""
    return _refuse(product, product.detach().flatten(1), names)


def finite_gram(gram: Tensor, names: str) -> Tensor:
    """The same of inner products of rows, of which no entry and no part of its sum is larger than two squares."""
    return _refuse(gram, gram.detach().diagonal(dim1=-2, dim2=-1), names)


def _refuse(product: Tensor, numbers: Tensor, names: str) -> Tensor:
    wrong = ~numbers.isfinite().all(-1)
    if wrong.any():
        where = status.in_memories(wrong.nonzero().flatten().tolist())
        raise torch.linalg.LinAlgError(f"{names} is not finite{where}, or its square is not")
    return product


def with_ridge(gram: Tensor, ridge: Tensor) -> Tensor:
    return gram + torch.diag_embed(ridge.unsqueeze(-1).expand(gram.shape[:2]))
