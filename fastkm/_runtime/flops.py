"""The operators in torch.utils.flop_counter.FlopCounterMode, which counts 0 for operators without a formula."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastkm._runtime import counts
from fastkm._runtime.torch_private import argument_names

MODULE = "torch.utils.flop_counter"
# The axes of the arguments that give an operator its sizes.
AXES = {"mean": "BKC", "cov": "BKK", "weights": "BTK", "values": "BTC", "queries": "BQC"}
FILTER_AXES = AXES | {"queries": "BTK"}  # one query a step, in the space of the weights
PRODUCT_AXES = {"gram": "BNN", "cov": "BKK"}  # inner products of the N = K + T rows of a memory and its patterns


def count_flops_once_loaded(operators: list[str], namespaces: tuple[str, ...]) -> None:
    """Register the formulas of :mod:`fastkm._runtime.counts` as soon as PyTorch's counter is imported.

    The counter imports Triton, which takes twice as long as this package, so it is not imported for it.
    """

    def register(counter: ModuleType) -> None:
        for name in operators:
            for namespace in namespaces:
                operator = getattr(getattr(torch.ops, namespace), name)
                if operator not in counter.flop_registry:
                    counter.register_flop_formula(operator)(formula_of(name, argument_names(operator.default)))

    if MODULE in sys.modules:
        register(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _OnImport(register))


def formula_of(name: str, arguments: list[str]) -> Callable[..., int]:
    """Of the shapes of an operator's arguments, as the counter gives them: the operations of all memories."""
    flops = getattr(counts, name)
    axes = FILTER_AXES if name.startswith("filter_posterior") else PRODUCT_AXES if name == "write_gram" else AXES

    def formula(*given: Any, out_shape: Any = None, **named: Any) -> int:
        sizes: dict[str, int] = {}
        for argument, shape in (*zip(arguments, given, strict=False), *named.items()):
            if argument in axes:
                sizes.update(zip(axes[argument], shape, strict=True))
        if "N" in sizes:
            sizes["T"] = sizes["N"] - sizes["K"]
        return sizes["B"] * sum(flops(*(sizes.get(letter, 0) for letter in "KCTQ")))

    return formula


class _OnImport(importlib.abc.MetaPathFinder):
    """Calls ``then`` with PyTorch's counter when that is imported, once."""

    def __init__(self, then: Callable[[ModuleType], None]) -> None:
        self.then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self.then(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
