"""The operators of the package computed by a program of ``build.py`` in place of the extension's kernels."""

import struct
import subprocess
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkm._runtime import schema
from fastkm._runtime.options import CODE_DTYPES

NONE, NUMBER, TENSOR, SAME = 0, 1, 2, 3


def numbers(*values: int) -> bytes:
    return struct.pack(f"={len(values)}q", *values)


def padded(values: Sequence[int], filler: int) -> list[int]:
    return [*values, *[filler] * (3 - len(values))]


def span(x: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def header(x: Tensor) -> bytes:
    type_of_codes = CODE_DTYPES.index(x.dtype) if x.dtype in CODE_DTYPES else 0
    return numbers(TENSOR, type_of_codes, x.element_size(), span(x), *padded(x.shape, 1), *padded(x.stride(), 0))


def elements(x: Tensor) -> Tensor:
    """All from the first to the last, as bytes."""
    return x.as_strided((span(x),), (1,), x.storage_offset()).view(torch.uint8)


def packed(value: Tensor | int | bool | None) -> bytes:
    if value is None:
        return numbers(NONE)
    if not isinstance(value, Tensor):
        return numbers(NUMBER, value)
    return header(value) + elements(value).numpy().tobytes()


def all_packed(arguments: Sequence) -> list[bytes]:
    """Where the memory of a tensor has come already, its place is sent."""
    sent: list[bytes] = []
    places: dict[tuple, int] = {}
    for place, value in enumerate(arguments):
        key = (value.data_ptr(), value.shape, value.stride()) if isinstance(value, Tensor) and value.numel() else None
        same = places.setdefault(key, place) if key else place
        sent.append(packed(value) if same == place else numbers(SAME, same))
    return sent


def places_changed(operator) -> list[int]:
    arguments = operator._schema.arguments
    return [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]


class Program:
    """A running program, which answers one call after the other."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.answered: set[str] = set()  # names of operators
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, name: str, arguments: Sequence, results: Sequence[Tensor], changed: Sequence[int]) -> None:
        """Fill ``results``, which are contiguous, and the arguments at the places ``changed``."""
        assert self.process.stdin
        message = [numbers(len(name)), name.encode(), numbers(torch.get_num_threads(), len(arguments))]
        message += [*all_packed(arguments), numbers(len(results)), *map(header, results)]
        message.append(numbers(len(changed), *changed))
        self.process.stdin.write(b"".join(message))
        self.process.stdin.flush()
        for x in (*results, *(arguments[place] for place in changed)):
            if x.numel():
                elements(x).copy_(self.receive(name, span(x) * x.element_size()))
        self.answered.add(name)

    def receive(self, name: str, count: int) -> Tensor:
        assert self.process.stdout
        data = self.process.stdout.read(count)
        if len(data) < count:
            raise RuntimeError(f"{' '.join(self.command)} ended at {name} with status {self.process.wait()}")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def take_over(program: Program) -> torch.library.Library:
    """Let ``program`` compute the operators of the native backend, as long as what is returned is kept."""
    library = torch.library.Library("fastkm", "IMPL")

    def computed(name: str):
        operator = getattr(torch.ops.fastkm, name).default
        changed = places_changed(operator)

        def compute(*arguments):
            shapes = operator(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
            results = [
                torch.empty(x.shape, dtype=x.dtype) for x in ([shapes] if isinstance(shapes, Tensor) else shapes)
            ]
            program.call(name, arguments, results, changed)
            return results[0] if isinstance(shapes, Tensor) else tuple(results)

        return compute

    for name in (*schema.OPERATORS, *schema.CHANGING):
        library.impl(name, computed(name), "CPU", allow_override=True)
    torch.ops.fastkm.logdet(torch.eye(2).unsqueeze(0))
    if program.answered != {"logdet"}:
        raise RuntimeError("the extension still computes the operators")
    return library
