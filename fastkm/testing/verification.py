"""Results against the truth: the definition of an operation in float64, within an error that is derived, not tuned."""

import math
from typing import NamedTuple

import torch

from fastkm._runtime import dispatch
from fastkm.testing.definitions import Result
from fastkm.testing.episodes import Episode, reverse_rows
from fastkm.testing.operations import Case, computation

# The forms of one operation agree to this in float64, or to the gap between two of them where that is larger.
LEAST = {torch.float32: 0.0, torch.float64: 1e-12}


class Verdict(NamedTuple):
    """How a result compares with the truth, in the field that comes closest to its limit.

    Errors are relative to the field's largest entry.
    """

    ok: bool | None  # None: not available on this machine
    error: float = math.nan
    allowed: float = math.nan
    note: str = ""


class Allowance(NamedTuple):
    """``factor (error of another computation + roundings · eps)`` may be the error of a result."""

    factor: int = 2
    roundings: int = 1


OTHER_FORM = Allowance(8)  # for a form that rounds in another order: another algorithm has another constant


def kernel_allowance(case: Case) -> Allowance:
    """More for a gradient, whose field can be a single number: a sum over everything."""
    return Allowance(3, 4) if case.gradient else Allowance()


def relative_errors(result: Result, truth: Result) -> dict[str, float]:
    """The largest error of each field, relative to the largest entry of its truth."""
    return {
        name: (result[name].double() - exact).abs().max().item() / (exact.abs().max().item() or 1.0)
        for name, exact in truth.items()
    }


def compare(result: Result, truth: Result, rounding: dict[str, float], allowance: Allowance) -> Verdict:
    """``error ≤ factor (rounding + roundings · eps)`` in every field of the truth, relative to its largest entry.

    ``rounding`` is the error of each field in another computation in the dtype of ``result``.
    """
    for name, exact in truth.items():
        if name not in result or result[name].shape != exact.shape:
            came = list(result[name].shape) if name in result else "nothing"
            return Verdict(False, note=f"{name} must have shape {list(exact.shape)}, got {came}")
    verdicts = []
    for name, error in relative_errors(result, truth).items():
        dtype = result[name].dtype
        allowed = allowance.factor * (rounding[name] + allowance.roundings * torch.finfo(dtype).eps)
        allowed = max(allowed, LEAST[dtype])
        ok = error <= allowed  # False for NaN
        verdicts.append(Verdict(ok, error, allowed, name if ok else f"{name} is off"))
    return max(verdicts, key=lambda verdict: verdict.error / verdict.allowed if verdict.ok else math.inf)


def verify(case: Case, episode: Episode) -> dict[str, Verdict]:
    """A verdict on every backend of the operation, the reference first.

    The truth is the definition in float64 on the same inputs. The reference may have 8 times the error that an
    independent form has in the dtype of the inputs. In float32 every other backend may have twice the reference's own
    error (three times for a gradient); in float64, where the reference may be the truth itself, twice the error of the
    independent form.
    """
    form = computation(case)
    truth = form.definition(episode.to(torch.float64))
    rounding = relative_errors(form.other(episode), truth)
    verdicts = {}
    for backend in sorted(dispatch.CAPABILITIES[case.operation], key=dispatch.PREFERENCE.index, reverse=True):
        if reason := dispatch.why_not(case.operation, backend, episode.values):
            verdicts[backend] = Verdict(None, note=reason)
            continue
        allowance = OTHER_FORM if backend == "reference" else kernel_allowance(case)
        try:
            result = form.run(episode, backend)
            verdicts[backend] = compare(result, truth, rounding, allowance)
            if backend == "reference" and episode.values.dtype != torch.float64:
                rounding = reference_errors(case, episode, result, truth)
        except Exception as error:  # any exception of a backend is its verdict; the other backends are verified too
            verdicts[backend] = Verdict(False, note=f"{type(error).__name__}: {error}")
    return verdicts


def reference_errors(case: Case, episode: Episode, result: Result, truth: Result) -> dict[str, float]:
    """The reference's own error: the worse of two draws of its rounding, because one draw can be right by luck.

    The order of a memory's rows has no meaning; the second draw has them reversed.
    """
    reversed_rows = computation(case).run(episode.reverse_rows(), "reference")
    again = relative_errors(reversed_rows, {name: reverse_rows(name, exact) for name, exact in truth.items()})
    return {name: max(error, again[name]) for name, error in relative_errors(result, truth).items()}


def definition_error(case: Case, episode: Episode) -> Verdict:
    """The error of the definition in the dtype of the inputs, in its worst field; no limit applies to it."""
    definition = computation(case).definition
    own = relative_errors(definition(episode), definition(episode.to(torch.float64)))
    return Verdict(True, max(own.values()))
