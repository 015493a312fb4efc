"""The kinds of arguments that operations take.

A family lists the arguments of each operation once, with these. Every kind checks the caller's value in words and turns
it into what the operator takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastkm._runtime import guards


@dataclass(frozen=True)
class Argument:
    """One argument of a public function, called ``name`` in errors."""

    name: str

    def check(self, signature: guards.Signature, value: Any) -> tuple:
        """What the operator takes for ``value``, or an error in words."""
        raise NotImplementedError


@dataclass(frozen=True)
class State(Argument):
    """A :class:`fastkm.MemoryState`: mean and covariance."""

    def check(self, signature: guards.Signature, value: Any) -> tuple[Tensor, Tensor]:
        return signature.state(self.name, value)


@dataclass(frozen=True)
class Matrix(Argument):
    """A tensor of the memory's dtype with the axes ``letters``."""

    letters: str

    def check(self, signature: guards.Signature, value: Any) -> tuple[Tensor]:
        return (signature.tensor(self.name, value, self.letters),)


@dataclass(frozen=True)
class MatrixOrNoRows(Matrix):
    """Like :class:`Matrix`, or the same without a row."""

    def check(self, signature: guards.Signature, value: Any) -> tuple[Tensor]:
        no_rows = isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == 0
        letters = f"{self.letters[0]}0{self.letters[2]}" if no_rows else self.letters
        return (signature.tensor(self.name, value, letters),)


@dataclass(frozen=True)
class CodeDtype(Argument):
    """A dtype for codes: None, or that of the memory, or bfloat16 or float16 beside a float32 memory."""

    def check(self, signature: guards.Signature, value: Any) -> tuple[int | None]:
        return (signature.code_dtype(self.name, value),)


@dataclass(frozen=True)
class Codes(Matrix):
    """Like :class:`Matrix`, and beside a float32 memory it may be bfloat16 or float16."""

    def check(self, signature: guards.Signature, value: Any) -> tuple[Tensor]:
        return (signature.tensor(self.name, value, self.letters, low_precision=True),)


@dataclass(frozen=True)
class PatternVariance(Argument):
    """A positive number for all patterns, one a memory, or one a pattern."""

    def check(self, signature: guards.Signature, value: Any) -> tuple[Tensor]:
        return (signature.noise(self.name, value),)


@dataclass(frozen=True)
class PatternFactor(Argument):
    """A number in (0, 1] for all patterns, one a memory, or one a pattern; or None."""

    def check(self, signature: guards.Signature, value: Any) -> tuple[Tensor | None]:
        return (None,) if value is None else (signature.factor(self.name, value),)


@dataclass(frozen=True)
class MemoryVariance(Argument):
    """A positive number for all memories, or one a memory."""

    def check(self, signature: guards.Signature, value: Any) -> tuple[Tensor]:
        return (signature.per_memory(self.name, value),)


@dataclass(frozen=True)
class OptionalVariance(Argument):
    """A number of at least 0 for all memories, or a positive tensor, 0-d or one a memory. 0 becomes None."""

    def check(self, signature: guards.Signature, value: Any) -> tuple[Tensor | None]:
        if not isinstance(value, Tensor) and guards.non_negative(self.name, value) == 0:
            return (None,)
        return (signature.per_memory(self.name, value),)


@dataclass(frozen=True)
class Mask(Argument):
    """A bool tensor with the axes ``letters``, or None."""

    letters: str

    def check(self, signature: guards.Signature, value: Any) -> tuple[Tensor | None]:
        return (signature.mask(self.name, value, self.letters),)


@dataclass(frozen=True)
class Count(Argument):
    """An int of at least 1."""

    def check(self, signature: guards.Signature, value: Any) -> tuple[int]:
        return (guards.count(self.name, value),)


@dataclass(frozen=True)
class Word(Argument):
    """A word of ``table``. The operator takes what the table gives for it."""

    table: Mapping[str, bool | int]

    def check(self, signature: guards.Signature, value: Any) -> tuple[bool | int]:
        return (self.table[guards.choice(self.name, value, self.table)],)


@dataclass(frozen=True)
class Number(Argument):
    """A Python number of at least 0; None too, where ``optional``."""

    optional: bool = False

    def check(self, signature: guards.Signature, value: Any) -> tuple[float | None]:
        if value is None and self.optional:
            return (None,)
        return (guards.non_negative(self.name, value),)


@dataclass(frozen=True)
class Codec(Argument):
    """A callable from codes to codes."""

    def check(self, signature: guards.Signature, value: Any) -> tuple[Any]:
        if not callable(value):
            raise TypeError(f"{self.name} must be a callable from codes to codes, got {type(value).__name__}")
        return (value,)


# What a read takes of a :class:`fastkm.AddressingFactor`, and its queries: the first arguments of factored operators.
FACTOR_AND_QUERIES = (
    Matrix("factor.mean", "BKC"),
    Codes("queries", "BQC"),
    MemoryVariance("factor.ridge"),
    Matrix("factor.lower", "BKK"),
    Matrix("factor.pseudoinverse", "BCK"),
    MatrixOrNoRows("factor.gram", "BKK"),
)
