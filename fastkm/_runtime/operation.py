"""What a family declares once for each of its operations."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from fastkm._runtime.arguments import Argument, Codes, Count, State, Word
from fastkm._runtime.autograd import Differentiable
from fastkm._runtime.dispatch import reads_low_precision
from fastkm._runtime.guards import Signature
from fastkm._runtime.second_derivatives import REFERENCES


class Operation:
    """The arguments of an operation, its kernel on each backend, and what a bad status means.

    Args:
        name: as in ``CAPABILITIES`` of :mod:`fastkm._runtime.dispatch`, and as of the operator.
        arguments: in the order of the public function, which is that of the operator too.
        reference: the plain PyTorch form, with the arguments of the operator.
        native: the compiled operator. One with a gradient also serves the calls that :mod:`fastkm._runtime.call`
            need not check.
        triton: the module that holds a kernel called ``name``. It is imported by the first call that runs it.
        factored: the matrix that a memory with a bad status could not factor, for the error. Empty if the
            kernels report no status.
        removes: whether it refuses to take out what is not in the memory.
    """

    def __init__(
        self,
        name: str,
        *arguments: Argument,
        reference: Callable[..., Any],
        native: Callable[..., Any] | None = None,
        triton: str | None = None,
        factored: str = "",
        removes: bool = False,
    ) -> None:
        self.name = name
        self.arguments = arguments
        self.factored = factored
        self.removes = removes
        self.native = native if isinstance(native, Differentiable) else None
        self.kernels: dict[str, Callable[..., Any]] = {"reference": reference}
        REFERENCES[name] = reference
        if native is not None:
            self.kernels["native"] = native
        if triton is not None:
            self.kernels["triton"] = lambda *inputs: getattr(import_module(triton), name)(*inputs)
        self._index_inputs()

    def _index_inputs(self) -> None:
        """Which inputs of the operator are words, counts and codes, by their positions.

        Only codes that the native kernel does not widen itself on a CPU are indexed.
        """
        self.words: dict[int, Mapping[str, bool | int]] = {}
        self.counts: set[int] = set()
        self.codes_to_widen: list[int] = []
        position = 0
        for argument in self.arguments:
            if isinstance(argument, Word):
                self.words[position] = argument.table
            elif isinstance(argument, Count):
                self.counts.add(position)
            elif isinstance(argument, Codes) and not reads_low_precision(self.name, "native", "cpu"):
                self.codes_to_widen.append(position)
            position += 2 if isinstance(argument, State) else 1
        self.num_options = len(self.words) + len(self.counts)
        self.num_inputs = position

    def check(self, given: tuple) -> list:
        """The inputs of a kernel for the arguments that a caller has ``given``, or an error in words."""
        given += (None,) * (len(self.arguments) - len(given))
        signature = Signature()
        inputs: list = []
        for argument, value in zip(self.arguments, given, strict=True):
            inputs.extend(argument.check(signature, value))
        return inputs

    def input_names(self) -> list[str]:
        """The name of each input of the operator, for errors."""
        names: list[str] = []
        for argument in self.arguments:
            name = argument.name
            names.extend((f"{name}.mean", f"{name}.cov") if isinstance(argument, State) else (name,))
        return names

    def raise_in_words(self, given: tuple) -> None:
        """Say what is wrong with arguments that the operator has refused; return if nothing is."""
        try:
            self.check(given)
        except (TypeError, ValueError) as error:
            raise error from None  # the operator's refusal says less
