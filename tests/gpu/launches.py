"""Calls of every operator at the sizes of the presets, and the kernels that they launch, compiled ahead of time.

The tensors of these calls are never read.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import torch

import fastkm.addressing.triton
import fastkm.filtering.triton
import fastkm.matrix_normal.triton
import fastkm.posterior.triton
import fastkm.reading.triton
import fastkm.removal.triton
import fastkm.writing.triton  # noqa: F401  all register their operators
from fastkm._runtime.options import PRECISIONS
from fastkm.testing import operations
from fastkm.testing.operands import empty_operands
from fastkm.testing.presets import PRESETS
from gpu import aot

IEEE, TF32X3, TF32 = range(3)
OPERATORS = operations.GPU_OPERATORS


FILTERS = ("filter_posterior", "filter_posterior_backward")
LAWS = ("retention", "forgetting", None)


def calls(
    preset: str, *, B: int, Q: int, precision: int = IEEE, squared_gram: bool = False, law: str | None = "retention"
) -> dict[str, Callable]:
    """Every operator at a preset's sizes, by name; a filter decays by ``law``."""
    operands = empty_operands(PRESETS[preset], B, Q, "cpu", num_iters=3, squared_gram=squared_gram, precision=precision)
    arguments = {name: operations.OPERATORS[name].arguments(operands) for name in OPERATORS}
    for name in FILTERS:
        *first, retention, prior_var, _, read_before = arguments[name][:10]
        laws = [retention if law == each else None for each in ("retention", "forgetting")]
        arguments[name] = (*first, laws[0], prior_var, laws[1], read_before, *arguments[name][10:])
    return {name: partial(getattr(torch.ops.fastkm_triton, name), *given) for name, given in arguments.items()}


# Preset, options of the call, and the operators whose kernels these change.
EVERYWHERE = [("S", {"B": 256, "Q": 32}, OPERATORS)]
LARGER = [
    ("L", {"B": 2, "Q": 100}, ("update_posterior", "update_posterior_backward", "write", "write_backward")),
    ("L", {"B": 2, "Q": 100}, ("remove_patterns", "remove_patterns_backward")),
    ("L", {"B": 2, "Q": 100}, ("read", "read_backward", "read_factored", "kl_memory", "kl_memory_backward")),
    ("L", {"B": 2, "Q": 100, "precision": TF32}, ("update_posterior", "write", "read", "read_backward", *FILTERS)),
    ("L", {"B": 2, "Q": 100, "precision": TF32X3}, ("update_posterior", "read", "filter_posterior")),
    *(("L", {"B": 2, "Q": 100, "law": law}, FILTERS) for law in LAWS),
    ("LLM", {"B": 2, "Q": 100}, ("update_posterior", "write", "write_backward", "read")),
    ("M", {"B": 256, "Q": 32, "squared_gram": True}, ("read", "write", "factor_addressing")),
]


class Row(NamedTuple):
    """One kernel of one operator, built for one target."""

    operator: str
    preset: str
    precision: str
    kernel: str
    target: str
    aligned: bool  # rows of codes can be read 128 bits at a time
    multiplies_codes: bool
    built: aot.Built


def rows(target: str) -> list[Row]:
    """Build every kernel for a target, for sm_80 and sm_90 also as larger presets and other precisions make them."""
    found: dict[str, Row] = {}
    for preset, options, operators in EVERYWHERE + (LARGER if target in ("sm_80", "sm_90") else []):
        made, precision = calls(preset, **options), PRECISIONS[options.get("precision", IEEE)]
        for operator in operators:
            for launch in aot.record(made[operator], target):
                names = launch.kernel.arg_names
                known = {names[path[0]]: value for path, value in launch.constexprs.items() if len(path) == 1}
                key = f"{launch.name} {launch.signature} {launch.constexprs} {launch.options}"
                if key not in found:
                    first_phase = known.get("SPLIT", False) and known.get("FACTOR", False)
                    found[key] = Row(
                        *(operator, preset, precision, launch.name, target),
                        aligned=known.get("ALIGNED", False) and not first_phase,
                        multiplies_codes="PRECISION" in known and not first_phase,
                        built=aot.build(launch, target),
                    )
    return list(found.values())


def all_rows(targets=tuple(aot.TARGETS)) -> list[Row]:
    """For every target, in two processes, as compiling takes minutes."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return [row for some in pool.map(rows, targets) for row in some]
