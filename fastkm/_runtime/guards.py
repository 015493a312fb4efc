"""The checks of one call's arguments, in words.

An error names the argument, what was expected (computed from the arguments before it) and what came.
``TypeError`` is for a wrong kind or dtype, ``ValueError`` for a wrong shape, device or value. In a compiled or captured
graph a wrong value raises ``RuntimeError`` when the graph runs.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastkm._runtime.deferred import is_value_unknown
from fastkm._runtime.torch_private import assert_when_run

DTYPES = (torch.float32, torch.float64)  # of a memory
LOW_PRECISION = (torch.bfloat16, torch.float16)  # of codes beside a float32 memory


class Signature:
    """Reads the arguments of one call in order and holds each to the letters fixed by those before it.

    >>> s = Signature()
    >>> s.tensor("mean", mean, "BKC")      # fixes B, K, C, the dtype and the device
    >>> s.tensor("cov", cov, "BKK")        # must agree
    """

    __slots__ = ("first", "sizes")

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.first: tuple[str, Tensor] | None = None

    def tensor(self, name: str, value: object, letters: str, *, low_precision: bool = False) -> Tensor:
        """``low_precision``: bfloat16 and float16 may stand beside float32."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor of shape {self._shape(letters)}, got {type(value).__name__}")
        if self.first is None:
            if value.dtype not in DTYPES:
                raise TypeError(f"{name} must be float32 or float64, got {dtype_name(value.dtype)}")
            self.first = (name, value)
        self._same_kind(name, value, low_precision)
        shape = tuple(value.shape)
        if shape != tuple(map(self.sizes.get, letters)):  # a letter without a size yet is None
            self._learn(name, letters, shape)
        return value

    def _learn(self, name: str, letters: str, shape: tuple[int, ...]) -> None:
        """Fix the letters that ``shape`` is the first to give a size."""
        sizes = self.sizes
        if len(shape) != len(letters) or any(
            sizes.setdefault(letter, size) != size for letter, size in zip(letters, shape, strict=True)
        ):
            raise ValueError(f"{name} must have shape {self._shape(letters)}, got {list(shape)}")

    def state(self, name: str, value: object) -> tuple[Tensor, Tensor]:
        if not isinstance(value, tuple) or len(value) != 2:
            raise TypeError(f"{name} must be a MemoryState(mean, cov), got {type(value).__name__}")
        return self.tensor(f"{name}.mean", value[0], "BKC"), self.tensor(f"{name}.cov", value[1], "BKK")

    def noise(self, name: str, value: float | Tensor) -> Tensor:
        """A variance per pattern, viewed as [B, T]: a float, or a 0-d, [B] or [B, T] tensor."""
        return spread_variance(self._positive(name, value, ("", "B", "BT")), (self.sizes["B"], self.sizes["T"]))

    def per_memory(self, name: str, value: float | Tensor) -> Tensor:
        """A positive number per memory, viewed as [B]: a float, or a 0-d or [B] tensor."""
        return spread_variance(self._positive(name, value, ("", "B")), (self.sizes["B"],))

    def _positive(self, name: str, value: float | Tensor, layouts: tuple[str, ...]) -> Tensor:
        _, first = self.first  # type: ignore[misc]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not torch.finfo(first.dtype).tiny <= value <= torch.finfo(first.dtype).max:
                raise ValueError(f"{name} must be positive and finite in {dtype_name(first.dtype)}, got {value}")
            return torch.full((), value, dtype=first.dtype, device=first.device)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}")
        self._same_kind(name, value)
        shape = tuple(value.shape)
        if not any([shape == tuple(map(self.sizes.get, layout)) for layout in layouts]):
            allowed = ", ".join("0-d" if not layout else self._shape(layout) for layout in layouts)
            raise ValueError(f"{name} must be a float or a tensor of shape {allowed}, got {list(value.shape)}")
        if value.device.type == "cpu" and not _positive_and_finite(value, f"{name} must be positive"):
            least = torch.func.debug_unwrap(value).min()
            raise ValueError(f"{name} must be positive and finite everywhere, got a smallest value of {least}")
        return value

    def mask(self, name: str, value: Tensor | None, letters: str) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            got = dtype_name(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a bool tensor of shape {self._shape(letters)}, got {got}")
        first_name, first = self.first  # type: ignore[misc]
        if value.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like {first_name}, got {value.device}")
        if list(value.shape) != [self.sizes[letter] for letter in letters]:
            raise ValueError(f"{name} must have shape {self._shape(letters)}, got {list(value.shape)}")
        return value

    def _same_kind(self, name: str, value: Tensor, low_precision: bool = False) -> None:
        first_name, first = self.first  # type: ignore[misc]
        allowed = LOW_PRECISION if low_precision and first.dtype == torch.float32 else ()
        if value.dtype != first.dtype and value.dtype not in allowed:
            wanted, got = dtype_name(first.dtype), dtype_name(value.dtype)
            raise TypeError(f"{name} must be {wanted} like {first_name}, got {got}")
        if value.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like {first_name}, got {value.device}")

    def _shape(self, letters: str) -> str:
        names = ", ".join(letters)
        known = ", ".join(str(self.sizes.get(letter, letter)) for letter in letters)
        return f"[{names}]" if names == known else f"[{names}] = [{known}]"


def spread_variance(value: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """A number for all, or one a memory, viewed as one for each of ``sizes``."""
    return (value.unsqueeze(-1) if 0 < value.dim() < len(sizes) else value).expand(sizes)


def count(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def choice(name: str, value: str, allowed: Iterable[str]) -> str:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _positive_and_finite(value: Tensor, message: str) -> bool:
    """Looks through the wrappers of torch.func; a NaN is neither."""
    if is_value_unknown(value):
        assert_when_run(((value > 0) & (value < math.inf)).all(), message)
        return True
    value = torch.func.debug_unwrap(value).detach()
    return value.numel() == 0 or all(0 < bound.item() < math.inf for bound in torch.aminmax(value))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cleaned(code: object, like: Tensor) -> Tensor:
    """What the caller's ``clean`` returned for ``like``: codes of the same shape, dtype and device."""
    if not isinstance(code, Tensor):
        raise TypeError(f"clean must return a tensor like its input, got {type(code).__name__}")
    if code.dtype != like.dtype:
        raise TypeError(f"clean must return {dtype_name(like.dtype)} like its input, got {dtype_name(code.dtype)}")
    if (code.shape, code.device) != (like.shape, like.device):
        wanted, got = (f"{list(x.shape)} on {x.device}" for x in (like, code))
        raise ValueError(f"clean must return codes like its input, {wanted}; got {got}")
    return code


def non_negative(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return value


def positive_like(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A positive number, or a tensor of them, in the dtype and on the device of ``like``."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.device.type == "cpu" and not _positive_and_finite(value, f"{name} must be positive"):
        raise ValueError(f"{name} must be positive and finite, got {torch.func.debug_unwrap(value)}")
    return value
