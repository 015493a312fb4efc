"""The state of a memory, and the letters every shape in this package is written with.

======  ==========================================================
letter  axis
======  ==========================================================
B       independent memories (one per episode)
T       patterns written
Q       queries read
K       rows of a memory (slots)
C       size of a code (columns)
n       read iterations
======  ==========================================================

Layout is batch first: values ``[B, T, C]``, weights ``[B, T, K]``, mean ``[B, K, C]``, cov ``[B, K, K]``.
"""

import os
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from fastkm._files import AnyPath, replace_file
from fastkm._runtime import guards
from fastkm._runtime.results import result


@result
class MemoryState(NamedTuple):
    """A memory ``M [K, C]`` whose columns are independent Gaussians that share one covariance.

    ``M[:, c] ~ N(mean[:, c], cov)`` for every column ``c``, so ``M`` is matrix normal with row covariance
    ``cov`` and the identity as column covariance.
    """

    mean: Tensor  # [B, K, C]
    cov: Tensor  # [B, K, K], symmetric positive definite


@result
class InformationState(NamedTuple):
    """The same law in information form: ``precision = cov⁻¹`` and ``information = cov⁻¹ mean``.

    What patterns teach the memory is added here, and what they taught is subtracted. See
    :func:`fastkm.to_information`.
    """

    precision: Tensor  # [B, K, K], Λ, symmetric positive definite
    information: Tensor  # [B, K, C], η = Λ R


@result
class SquareRootState(NamedTuple):
    """The same law with a square root of the covariance: ``cov = root rootᵀ``. See :func:`fastkm.to_square_root`."""

    mean: Tensor  # [B, K, C]
    root: Tensor  # [B, K, K], any matrix S with cov = S Sᵀ; it need not be triangular


# The forms of a memory, and the axes of their tensors.
FORMS: dict[type, tuple[str, str]] = {
    MemoryState: ("BKC", "BKK"),
    InformationState: ("BKK", "BKC"),
    SquareRootState: ("BKC", "BKK"),
}
Form = TypeVar("Form", bound=MemoryState | InformationState | SquareRootState)


@result
class AddressingFactor(NamedTuple):
    """What addressing needs of memories, computed once by :func:`fastkm.factor_addressing`.

    ``A = R Rᵀ + λI``, or ``(R Rᵀ)² + λI`` for ``method="deepmind"``. The factor has copies of ``R`` and ``λ``, so it
    answers for the memory that it was made of, also after that memory has changed.
    """

    mean: Tensor  # [B, K, C], R
    ridge: Tensor  # [B], λ
    lower: Tensor  # [B, K, K], L with L Lᵀ = A
    pseudoinverse: Tensor  # [B, C, K], Rᵀ A⁻¹, or Rᵀ R Rᵀ A⁻¹: row c has the weights of the c-th unit code
    gram: Tensor  # [B, K, K], R Rᵀ, for "deepmind"; else [B, 0, K]


def save_memory_state(state: MemoryState | InformationState | SquareRootState, path: AnyPath) -> None:
    """Write ``state`` to ``path`` in the safetensors format (needs the ``safetensors`` extra).

    The file is written beside ``path`` and then takes its place, so ``path`` never holds a part of a state.

    Args:
        state: mean ``[B, K, C]`` and cov ``[B, K, K]``, float32 or float64; any pair of tensors. Or an
            :class:`InformationState` or a :class:`SquareRootState`.
        path: a file in a folder that exists. A file that is there is replaced and keeps its permissions.

    Raises:
        TypeError, ValueError: ``state`` is no pair of tensors of these shapes and one dtype.
        OSError: ``path`` cannot be written.
    """
    from safetensors.torch import save_file

    form = type(state) if type(state) in FORMS else MemoryState
    # A clone has the values that a negated or expanded view stands for, and shares no memory with the other tensor.
    tensors = dict(zip(form._fields, map(_own_copy, check_form("state", state, form)), strict=True))
    with replace_file(path) as partial:
        save_file(tensors, partial)


@overload
def load_memory_state(path: AnyPath, device: str | torch.device = "cpu") -> MemoryState: ...
@overload
def load_memory_state(path: AnyPath, device: str | torch.device = "cpu", *, form: type[Form]) -> Form: ...
def load_memory_state(path: AnyPath, device: str | torch.device = "cpu", *, form: Any = MemoryState) -> Any:
    """Read back what :func:`save_memory_state` wrote (needs the ``safetensors`` extra).

    The tensors are copies: they stay as they are when the file is written again.

    Args:
        path: the file.
        device: where the tensors go.
        form: what the file holds: ``MemoryState``, ``InformationState`` or ``SquareRootState``.

    Raises:
        TypeError: ``form`` is none of the three.
        TypeError, ValueError: the file holds something else than one state of this form.
        OSError: ``path`` cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not any([form is known for known in _WORDS]):
        got = getattr(form, "__name__", repr(form))
        raise TypeError(f"form must be {', '.join(x.__name__ for x in _WORDS)}, got {got}")
    name = os.fsdecode(path)
    with open(name, "rb") as file:
        content = file.read()  # once, for another process may replace the file meanwhile
    try:
        tensors = load(content)
        if tensors.keys() != set(form._fields):
            names = sorted(tensors)
            held = ", ".join(names[:4]) + (", …" if names[4:] else "") if names else "nothing"
            raise ValueError(f"it must hold {' and '.join(form._fields)} and nothing else, it holds {held}")
        checked = check_form("state", form(**tensors), form)
        return form(*(tensor.to(device, copy=True) for tensor in checked))
    except (SafetensorError, TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} holds no {_WORDS[form]}: {error}") from error


_WORDS = {MemoryState: "memory state", InformationState: "information state", SquareRootState: "square-root state"}


def check_form(name: str, value: object, form: type) -> tuple[Tensor, Tensor]:
    """The two tensors of a state of ``form`` that a caller gives as ``name``, or an error in words."""
    signature = guards.Signature()
    first, second = form._fields  # type: ignore[attr-defined]
    pair = guards.pair(name, value, f"{form.__name__}({first}, {second})")
    tensors = [
        signature.tensor(f"{name}.{field}", x, letters)
        for field, x, letters in zip((first, second), pair, FORMS[form], strict=True)
    ]
    return tensors[0], tensors[1]


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
