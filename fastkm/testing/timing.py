"""The one timer: several candidates in turn, so that a drift of the machine meets all of them alike."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

SHORTEST = 1e-3  # seconds of one sample; a shorter call is repeated within it
WARM_UP = 5e-3  # seconds of calls ahead of a sample: cores wake and speed up, caches fill
LONG = 0.02  # seconds; a call that takes longer needs no warm-up
MOST_SAMPLES, LEAST_SAMPLES = 41, 3  # of a candidate
SLOW = 0.25  # seconds; a call that takes longer gets two samples, of which its first call is one


class Timing(NamedTuple):
    """Seconds a call: median and quartiles over the samples."""

    median: float
    lower: float
    upper: float
    rounds: int  # samples
    calls: int  # a sample

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
    """Without the garbage collector, which would run within the sample of one candidate."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def schedule(costs: Mapping[str, float], least: Mapping[str, int], seconds: float) -> list[str]:
    """Which candidate is timed when: rounds in a random order; slow candidates are in some rounds only, evenly spread.

    Every candidate gets about the same share of ``seconds``, at least ``least`` and at most ``MOST_SAMPLES`` samples.
    No candidate is always timed after the same other one.
    """
    share, draw = seconds / len(costs), random.Random(0)
    samples = {name: min(MOST_SAMPLES, max(least[name], round(share / cost))) for name, cost in costs.items()}
    rounds, order = max(samples.values()), []
    for r in range(rounds):
        now = [name for name, count in samples.items() if (r + 1) * count // rounds > r * count // rounds]
        draw.shuffle(now)
        order += now
    return order


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    shortest: float = SHORTEST,
    warm_up: float = WARM_UP,
) -> dict[str, Timing]:
    """Median and quartiles of the seconds a call takes, all candidates in turn, for about ``seconds``.

    A sample is of a candidate's steady state: calls that are not timed come first, because the candidate before it may
    have left a core asleep or at a low clock for milliseconds. Calls are repeated until a sample takes ``shortest``.
    """
    first = {name: clock(call) for name, call in candidates.items()}
    samples = {name: [once] if once >= SLOW else [] for name, once in first.items()}
    first |= {name: min(once, clock(candidates[name])) for name, once in first.items() if once < SLOW}
    calls = {name: max(1, math.ceil(shortest / once)) for name, once in first.items()}
    ahead = {name: math.ceil(warm_up / once) if once < LONG else 0 for name, once in first.items()}
    costs = {name: once * (ahead[name] + calls[name]) for name, once in first.items()}
    least = {name: 1 if taken else LEAST_SAMPLES for name, taken in samples.items()}
    with no_collection():
        for name in schedule(costs, least, seconds):
            for _ in range(ahead[name]):
                candidates[name]()
            samples[name].append(clock(candidates[name], calls[name]))
    return {name: Timing.of(times, calls[name]) for name, times in samples.items()}
