"""What is verified and timed: every backend and precision of a case beside forms in PyTorch, each judged by float64."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch

from benchmarks.forms import LOOP
from fastkm import MemoryState
from fastkm._runtime import dispatch
from fastkm.testing.definitions import Result
from fastkm.testing.episodes import Episode
from fastkm.testing.operations import GPU_OPERATIONS, GRADIENT_CASES, OPERATIONS, Case, computation
from fastkm.testing.verification import (
    OTHER_FORM,
    Verdict,
    compare,
    definition_error,
    kernel_allowance,
    reference_errors,
    relative_errors,
)

Call = Callable[[], Result]
COMPILED, BLOCK_FORM, REFERENCE = "torch.compile", "block form", "reference"
KERNELS = ("native", "triton")
KINDS = (*KERNELS, REFERENCE, BLOCK_FORM, COMPILED, LOOP)  # a candidate's name is its kind, or kind and precision
# Bits that a product with codes keeps of each factor, on a unit that truncates.
SIGNIFICANT = {"tf32x3": 20, "tf32": 10}
# In the order of what they tell: the operations that models spend their time in come first.
CASES = tuple(
    sorted(
        (*map(Case, GPU_OPERATIONS), *(case for case in GRADIENT_CASES if case.operation in GPU_OPERATIONS)),
        key=lambda case: not OPERATIONS[case.operation].takes_precision,
    )
)


def candidates(case: Case, episode: Episode, kinds: Sequence[str]) -> dict[str, Call]:
    """Every computation of the case of these kinds: a backend by its name, or by its name and a precision."""
    form, known = computation(case), dispatch.CAPABILITIES[case.operation]
    ways: dict[str, Call] = {name: partial(form.run, episode, name) for name in (*KERNELS, REFERENCE) if name in known}
    if OPERATIONS[case.operation].takes_precision:
        for name in (name for name in KERNELS if name in known):
            for precision in SIGNIFICANT:
                ways[f"{name} {precision}"] = partial(form.run, episode, name, precision=precision)
    if case.operation == "write":
        ways[BLOCK_FORM] = partial(form.other, episode)  # in Gram space
    ways[COMPILED] = torch.compile(lambda: form.run(episode, REFERENCE))
    if form.loop is not None:
        ways[LOOP] = partial(form.definition, episode)
    return {name: call for name, call in ways.items() if kind_of(name) in kinds}


def kind_of(candidate: str) -> str:
    return next(kind for kind in KINDS if candidate.startswith(kind))


def precision_of(candidate: str) -> str:
    precision = candidate.rpartition(" ")[2]
    return precision if precision in SIGNIFICANT else "ieee"


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def rounding_errors(case: Case, episode: Episode, bits: int, truth: Result) -> dict[str, float]:
    """The errors of rounding once everything that products with codes multiply: memories, weights, codes."""

    def coarse(state: MemoryState) -> MemoryState:
        return state._replace(mean=rounded(state.mean, bits))

    names = ("weights", "values", "queries")
    given = {name: rounded(getattr(episode, name), bits) for name in names}
    given |= {name: coarse(getattr(episode, name)) for name in ("prior", "written")}
    return relative_errors(computation(case).run(episode._replace(**given), REFERENCE), truth)


class Judge:
    """Verdicts on the candidates of one case, one at a time: a kernel that ends the process spoils no other verdict."""

    def __init__(self, case: Case, episode: Episode):
        self.case, self.episode, self.form = case, episode, computation(case)

    @cached_property
    def truth(self) -> Result:
        return self.form.definition(self.episode.to(torch.float64))

    @cached_property
    def rounding(self) -> dict[str, float]:
        return reference_errors(self.case, self.episode, self.form.run(self.episode, REFERENCE), self.truth)

    def verdict(self, name: str, call: Call) -> Verdict:
        """Is the error at most what the candidate's kind and precision allow?"""
        if reason := self.unavailable(name):
            return Verdict(None, note=reason)
        if name == LOOP:
            return definition_error(self.case, self.episode)
        if name == REFERENCE:
            independent = relative_errors(self.form.other(self.episode), self.truth)
            return compare(call(), self.truth, independent, OTHER_FORM)
        if name in KERNELS:
            return compare(call(), self.truth, self.rounding, kernel_allowance(self.case))
        rounding = self.rounding
        if bits := SIGNIFICANT.get(precision_of(name)):
            once = rounding_errors(self.case, self.episode, bits, self.truth)
            rounding = {field: max(e, once[field]) + 2.0**-bits for field, e in rounding.items()}
        return compare(call(), self.truth, rounding, OTHER_FORM)

    def unavailable(self, name: str) -> str | None:
        kind = kind_of(name)
        return dispatch.why_not(self.case.operation, kind, self.episode.values) if kind in KERNELS else None
