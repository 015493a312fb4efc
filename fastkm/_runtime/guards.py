"""The checks of one call's arguments, in words.

An error names the argument, what was expected (computed from the arguments before it) and what came.
``TypeError`` is for a wrong kind or dtype, ``ValueError`` for a wrong shape, device or value. In a compiled or captured
graph a wrong value raises ``RuntimeError`` when the graph runs.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastkm._runtime.deferred import assert_later, is_value_unknown, known
from fastkm._runtime.options import CODE_DTYPES

DTYPES = (torch.float32, torch.float64)  # of a memory
LOW_PRECISION = (torch.bfloat16, torch.float16)  # of codes beside a float32 memory
# Of a state, in words.
FORMS = ("MemoryState(mean, cov)", "InformationState(precision, information)", "SquareRootState(mean, root)")
LARGEST_COUNT = 2**63 - 1  # what an operator takes


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
            check_layout(name, value)
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
        mean, cov = pair(name, value)
        return self.tensor(f"{name}.mean", mean, "BKC"), self.tensor(f"{name}.cov", cov, "BKK")

    def noise(self, name: str, value: float | Tensor) -> Tensor:
        """A variance per pattern, viewed as [B, T]: a float, or a 0-d, [B] or [B, T] tensor."""
        return spread_variance(self._positive(name, value, ("", "B", "BT")), (self.sizes["B"], self.sizes["T"]))

    def factor(self, name: str, value: float | Tensor) -> Tensor:
        """A number in (0, 1] per pattern, viewed as [B, T]: a float, or a 0-d, [B] or [B, T] tensor."""
        factor = self._positive(name, value, ("", "B", "BT"), most=1)
        return spread_variance(factor, (self.sizes["B"], self.sizes["T"]))

    def per_memory(self, name: str, value: float | Tensor) -> Tensor:
        """A positive number per memory, viewed as [B]: a float, or a 0-d or [B] tensor."""
        return spread_variance(self._positive(name, value, ("", "B")), (self.sizes["B"],))

    def _positive(self, name: str, value: float | Tensor, layouts: tuple[str, ...], most: float = math.inf) -> Tensor:
        _, first = self.first  # type: ignore[misc]
        if not isinstance(value, Tensor):
            return positive_number(name, value, first, most)
        self._same_kind(name, value)
        shape = tuple(value.shape)
        if not any([shape == tuple(map(self.sizes.get, layout)) for layout in layouts]):
            allowed = ", ".join("0-d" if not layout else self._shape(layout) for layout in layouts)
            raise ValueError(f"{name} must be a float or a tensor of shape {allowed}, got {list(value.shape)}")
        _check_positive(name, value, most)
        return value

    def mask(self, name: str, value: Tensor | None, letters: str) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            got = dtype_name(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a bool tensor of shape {self._shape(letters)}, got {got}")
        check_layout(name, value)
        first_name, first = self.first  # type: ignore[misc]
        if value.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like {first_name}, got {value.device}")
        if list(value.shape) != [self.sizes[letter] for letter in letters]:
            raise ValueError(f"{name} must have shape {self._shape(letters)}, got {list(value.shape)}")
        return value

    def code_dtype(self, name: str, value: torch.dtype | None) -> int | None:
        """None for the dtype of the memory, else the index of a dtype in ``CODE_DTYPES``."""
        _, first = self.first  # type: ignore[misc]
        if value is None or value == first.dtype:
            return None
        if first.dtype != torch.float32 or value not in LOW_PRECISION:
            low = " or ".join(map(dtype_name, LOW_PRECISION if first.dtype == torch.float32 else ()))
            wanted = dtype_name(first.dtype) + (f", {low}" if low else "")
            got = dtype_name(value) if isinstance(value, torch.dtype) else type(value).__name__
            raise TypeError(f"{name} must be None or {wanted}, got {got}")
        return CODE_DTYPES.index(value)

    def _same_kind(self, name: str, value: Tensor, low_precision: bool = False) -> None:
        check_layout(name, value)
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


def pair(name: str, value: object, form: str = FORMS[0]) -> tuple[Tensor, Tensor]:
    """The two tensors of the state that a caller gives, which may be any pair but a state of another form."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or _is_other_form(value, form):
        raise TypeError(f"{name} must be {'an' if form[0] == 'I' else 'a'} {form}, got {type(value).__name__}")
    return value[0], value[1]


def _is_other_form(value: tuple | list, form: str) -> bool:
    kind = f"{type(value).__name__}("
    return not form.startswith(kind) and any([known.startswith(kind) for known in FORMS])


def factor(value: object) -> tuple:
    """The five tensors of the :class:`fastkm.AddressingFactor` that a caller gives."""
    if not isinstance(value, (tuple, list)) or len(value) != 5:
        raise TypeError(
            "factor must be an AddressingFactor(mean, ridge, lower, pseudoinverse, gram), as factor_addressing "
            f"returns it, got {type(value).__name__}"
        )
    return tuple(value)


def check_layout(name: str, value: Tensor) -> None:
    """Sparse, mkldnn and nested tensors have no strides, by which kernels read."""
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a tensor of layout {layout}")


def _unwrap_scalar(value: Any) -> Any:
    """A Python number in place of one of NumPy or of a 0-d array; anything else as it is."""
    if isinstance(value, (int, float, Tensor)) or getattr(value, "shape", None) != ():
        return value
    return value.item()


def number(name: str, value: Any, wanted: str = "a float") -> float:
    """The number that a caller gives, of Python or NumPy or, in a graph, a symbol."""
    plain = _unwrap_scalar(value)
    if isinstance(plain, bool) or not isinstance(plain, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
    return plain  # type: ignore[return-value]


def count(name: str, value: Any, least: int = 1) -> int:
    """The int that a caller gives, of Python or NumPy or, in a graph, a size; torch.jit.trace has tensors as sizes."""
    plain = _unwrap_scalar(value)
    if not (_is_traced_size(plain) or (isinstance(plain, (int, torch.SymInt)) and not isinstance(plain, bool))):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if plain < least:
        raise ValueError(f"{name} must be at least {least}, got {plain}")
    if plain > LARGEST_COUNT:
        raise ValueError(f"{name} must be less than 2^63, got {plain}")
    return plain


def _is_traced_size(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 0 and torch.jit.is_tracing()


def choice(name: str, value: str, allowed: Iterable[str]) -> str:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def positive_number(name: str, value: Any, like: Tensor, most: float = math.inf) -> Tensor:
    """A number in (0, ``most``] as a 0-d tensor in the dtype and on the device of ``like``.

    Dynamo keeps a float symbolic in a product; ``torch.full`` would make it compile again for every value.
    """
    value, limits = number(name, value, "a float or a tensor"), torch.finfo(like.dtype)
    if not limits.tiny <= value <= min(most, limits.max):
        raise ValueError(f"{name} must be positive and {_bound(most)} in {dtype_name(like.dtype)}, got {value}")
    if torch.compiler.is_compiling():
        return like.new_ones(()) * value
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _bound(most: float) -> str:
    return "finite" if most == math.inf else f"at most {most}"


def _check_positive(name: str, value: Tensor, most: float = math.inf) -> None:
    """Positive, normal and at most ``most``, as for a number; a NaN is not. Nothing waits for the values of a GPU."""
    if value.device.type not in ("cpu", "meta"):
        return
    limits = torch.finfo(value.dtype)
    most_held = min(most, limits.max)
    if is_value_unknown(value):
        in_range = ((value >= limits.tiny) & (value <= most_held)).all()
        assert_later(in_range, f"{name} must be positive and {_bound(most)}")
        return
    value = known(value)
    if value.numel() == 0 or all(limits.tiny <= bound.item() <= most_held for bound in torch.aminmax(value)):
        return
    least, largest, dtype = value.min(), value.max(), dtype_name(value.dtype)
    wrong = f"largest value of {largest}" if least >= limits.tiny else f"smallest value of {least}"
    raise ValueError(f"{name} must be positive and {_bound(most)} everywhere in {dtype}, got a {wrong}")


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
    value = number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return value


def positive_like(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A positive number, or a tensor of them, on the device of ``like``; a number takes the dtype of ``like``."""
    if not isinstance(value, Tensor):
        return positive_number(name, value, like)
    check_layout(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {dtype_name(value.dtype)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
    _check_positive(name, value)
    return value
