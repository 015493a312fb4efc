"""Verification against float64, and timing of several callables in turn."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastkm._runtime import dispatch
from fastkm.testing.episodes import Episode, reverse_rows
from fastkm.testing.gradients import ALL, GRADIENT
from fastkm.testing.operations import Result

# The forms of one operation agree to this in float64, or to the gap between two of them where that is larger.
LEAST = {torch.float32: 0.0, torch.float64: 1e-12}

SLOW = 0.25  # seconds; a first call this long is no colder than the next


class Verdict(NamedTuple):
    """How a result compares with the truth, in the field that comes closest to its limit.

    Errors are relative to the field's largest entry.
    """

    ok: bool | None  # None: not available on this machine
    error: float = math.nan
    allowed: float = math.nan
    note: str = ""


def errors(result: Result, truth: Result) -> dict[str, float]:
    """The largest error of each field, relative to the largest entry of its truth."""
    return {
        name: (result[name].double() - exact).abs().max().item() / (exact.abs().max().item() or 1.0)
        for name, exact in truth.items()
    }


def granted(operation: str) -> tuple[int, int]:
    """``factor`` and ``roundings`` of :func:`judge` for a kernel: a gradient can be a single number, a sum over all."""
    return (3, 4) if operation.endswith(GRADIENT) else (2, 1)


def judge(result: Result, truth: Result, own: dict[str, float], factor: int = 2, roundings: int = 1) -> Verdict:
    """``error ≤ factor (own + roundings · eps)`` in every field of the truth, relative to the field's largest entry.

    ``own`` is the error that another computation in the dtype of ``result`` makes: the rounding to be granted.
    """
    for name, exact in truth.items():
        if name not in result or result[name].shape != exact.shape:
            came = list(result[name].shape) if name in result else "nothing"
            return Verdict(False, note=f"{name} must have shape {list(exact.shape)}, got {came}")
    verdicts = []
    for name, error in errors(result, truth).items():
        dtype = result[name].dtype
        allowed = max(factor * (own[name] + roundings * torch.finfo(dtype).eps), LEAST[dtype])
        ok = error <= allowed  # NaN fails
        verdicts.append(Verdict(ok, error, allowed, name if ok else f"{name} is off"))
    return max(verdicts, key=lambda v: v.error / v.allowed if v.ok else math.inf)


def verify(operation: str, episode: Episode) -> dict[str, Verdict]:
    """A verdict on every backend of ``operation``, the reference first.

    The truth is the definition in float64 on the same inputs. The reference is held to 8 times the error that an
    independent form makes in the dtype of the inputs (another algorithm, another constant). Every other backend is
    held to twice the reference's own error in float32 (three times for a gradient), and to twice that of the
    independent form in float64, where the reference may be the truth itself.
    """
    op, low = ALL[operation], episode.values.dtype != torch.float64
    capable = operation.removesuffix(GRADIENT)
    truth = op.definition(episode.to(torch.float64))
    own = errors(op.other(episode), truth)
    verdicts = {}
    for backend in sorted(dispatch.CAPABILITIES[capable], key=dispatch.PREFERENCE.index, reverse=True):
        if reason := dispatch.why_not(capable, backend, episode.values):
            verdicts[backend] = Verdict(None, note=reason)
            continue
        try:
            result = op.run(episode, backend)
            verdicts[backend] = judge(result, truth, own, *((8,) if backend == "reference" else granted(operation)))
            if backend == "reference" and low:
                own = reference_errors(operation, episode, result, truth)
        except Exception as error:  # whatever a backend raises is its verdict, and the others are still heard
            verdicts[backend] = Verdict(False, note=f"{type(error).__name__}: {error}")
    return verdicts


def reference_errors(operation: str, episode: Episode, result: Result, truth: Result) -> dict[str, float]:
    """The reference's own error: the worse of two draws of its rounding, as one draw can be right by luck.

    The order of a memory's rows means nothing; the second draw has them reversed.
    """
    reversed_rows = ALL[operation].run(episode.reverse_rows(), "reference")
    again = errors(reversed_rows, {name: reverse_rows(name, exact) for name, exact in truth.items()})
    return {name: max(error, again[name]) for name, error in errors(result, truth).items()}


def own_error(operation: str, episode: Episode) -> Verdict:
    """The error of the definition in the dtype of the inputs, in its worst field; nothing to hold it to."""
    definition = ALL[operation].definition
    own = errors(definition(episode), definition(episode.to(torch.float64)))
    return Verdict(True, max(own.values()))


class Timing(NamedTuple):
    """Seconds a call: median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float
    rounds: int
    calls: int  # a round

    @classmethod
    def of(cls, times: list[float], calls: int) -> "Timing":
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, lower, upper, len(times), calls)


def clock(call: Callable[[], object], calls: int = 1) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


@contextmanager
def no_collection() -> Iterator[None]:
    """The garbage collector would meet whoever is timed just then."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]], seconds: float, shortest: float = 1e-3
) -> dict[str, Timing]:
    """Time ``candidates`` in turn, A B C A B C …, for about ``seconds`` and three rounds or more.

    A drift of the machine then meets all of them alike. Calls are repeated until a round takes ``shortest`` seconds.
    What is too slow for three rounds in four times ``seconds`` gets two.
    """
    samples = {name: [clock(call)] for name, call in candidates.items()}  # to warm up, and to see how long it takes
    calls = {name: max(1, math.ceil(shortest / first)) for name, (first,) in samples.items()}
    for times in samples.values():
        if times[0] < SLOW:
            times.clear()
    with no_collection():
        start = time.perf_counter()
        for rounds in range(50):
            spent = time.perf_counter() - start
            if spent > (seconds if rounds >= 3 else 4 * seconds) and min(map(len, samples.values())) >= 2:
                break
            for name, call in candidates.items():
                samples[name].append(clock(call, calls[name]))
    return {name: Timing.of(times, calls[name]) for name, times in samples.items()}
