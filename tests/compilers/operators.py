"""The operators of the package computed by a program of ``build.py`` in place of the extension's kernels."""

import struct
import subprocess
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkm._runtime import schema

NONE, NUMBER, TENSOR = 0, 1, 2


def numbers(*values: int) -> bytes:
    return struct.pack(f"={len(values)}q", *values)


def padded(values: Sequence[int], filler: int) -> list[int]:
    return [*values, *[filler] * (3 - len(values))]


def span(x: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def header(x: Tensor) -> bytes:
    return numbers(TENSOR, x.element_size(), span(x), *padded(x.shape, 1), *padded(x.stride(), 0))


def packed(value: Tensor | int | bool | None) -> bytes:
    if value is None:
        return numbers(NONE)
    if not isinstance(value, Tensor):
        return numbers(NUMBER, value)
    elements = value.as_strided((span(value),), (1,), value.storage_offset())
    return header(value) + elements.numpy().tobytes()


class Program:
    """A running program, which answers one call after the other."""

    def __init__(self, command: list[str]) -> None:
        self.command, self.answered = command, 0
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, name: str, arguments: Sequence, results: Sequence[Tensor]) -> None:
        """Fill ``results``, which are contiguous."""
        assert self.process.stdin
        assert self.process.stdout
        message = [numbers(len(name)), name.encode(), numbers(torch.get_num_threads(), len(arguments))]
        message += [*map(packed, arguments), numbers(len(results)), *map(header, results)]
        self.process.stdin.write(b"".join(message))
        self.process.stdin.flush()
        for x in results:
            data = self.process.stdout.read(x.numel() * x.element_size())
            if len(data) < x.numel() * x.element_size():
                raise RuntimeError(f"{' '.join(self.command)} ended at {name} with status {self.process.wait()}")
            if data:
                x.copy_(torch.frombuffer(bytearray(data), dtype=x.dtype).view(x.shape))
        self.answered += 1

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def take_over(program: Program) -> torch.library.Library:
    """Let ``program`` compute the operators of the native backend, as long as what is returned is kept."""
    library = torch.library.Library("fastkm", "IMPL")

    def computed(name: str):
        operator = getattr(torch.ops.fastkm, name).default

        def compute(*arguments):
            shapes = operator(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
            results = [
                torch.empty(x.shape, dtype=x.dtype) for x in ([shapes] if isinstance(shapes, Tensor) else shapes)
            ]
            program.call(name, arguments, results)
            return results[0] if isinstance(shapes, Tensor) else tuple(results)

        return compute

    for name in schema.OPERATORS:
        library.impl(name, computed(name), "CPU", allow_override=True)
    torch.ops.fastkm.logdet(torch.eye(2).unsqueeze(0))
    if program.answered != 1:
        raise RuntimeError("the extension still computes the operators")
    return library
