"""Timing that can be trusted: pinned threads, candidates in turn, and one of them twice under two names."""

import ctypes
import math
import os
import platform
import random
from collections.abc import Callable, Mapping

import torch

from fastkm.testing.measure import Timing, clock, no_collection

SHORTEST = 1e-3  # seconds of one sample; a shorter call is repeated within it
WARM_UP = 5e-3  # seconds of calls ahead of a sample: cores wake and speed up, caches fill
LONG = 0.02  # seconds; beside a call that takes longer that is nothing
MOST, FEWEST = 41, 3  # samples of a candidate
SLOW = 0.25  # seconds; of a call that takes longer two samples have to do
LARGEST_GAP = 0.05  # between two timings of one thing; beyond it nothing is concluded
ATTEMPTS = 3


def pin(threads: int) -> str:
    """Threads and the cores they may run on, in words."""
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return f"{threads}, not bound to cores: this system has no sched_setaffinity"
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)
    return f"{threads} on cores {', '.join(map(str, cores))}"


def keep_freed_memory() -> str:
    """Large results come from memory the process already has, for every candidate; in words.

    By default glibc returns it to the system, and a result of megabytes waits for the kernel to clear its pages anew at
    every call.
    """
    if platform.libc_ver()[0] != "glibc":
        return "as the system's allocator has it"
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    return "kept by the process (glibc: M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1)"


def schedule(costs: Mapping[str, float], seconds: float) -> list[str]:
    """Who is timed when: rounds in which the order is drawn anew, slow candidates only in some, evenly spread.

    Every candidate gets about the same share of ``seconds``, within ``FEWEST`` and ``MOST`` samples. A drift of the
    machine meets all alike, and none is always timed after the same other one.
    """
    share, draw = seconds / len(costs), random.Random(0)
    least = {name: FEWEST if cost < SLOW else 2 for name, cost in costs.items()}
    samples = {name: min(MOST, max(least[name], round(share / cost))) for name, cost in costs.items()}
    rounds, order = max(samples.values()), []
    for r in range(rounds):
        now = [name for name, count in samples.items() if (r + 1) * count // rounds > r * count // rounds]
        draw.shuffle(now)
        order += now
    return order


def interleave(candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Median and quartiles of the seconds a call takes, all candidates in turn.

    A sample is of a candidate's steady state, not of the change from the one before it, which may have left a core
    asleep or at a low clock for milliseconds: all are called for a while before they are timed.
    """
    first = {name: clock(call) for name, call in candidates.items()}
    first |= {name: min(once, clock(candidates[name])) for name, once in first.items() if once < SLOW}
    calls = {name: max(1, math.ceil(SHORTEST / once)) for name, once in first.items()}
    ahead = {name: math.ceil(WARM_UP / once) if once < LONG else 0 for name, once in first.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with no_collection():
        for name in schedule({name: once * (ahead[name] + calls[name]) for name, once in first.items()}, seconds):
            for _ in range(ahead[name]):
                candidates[name]()
            samples[name].append(clock(candidates[name], calls[name]))
    return {name: Timing.of(times, calls[name]) for name, times in samples.items()}


def gap(first: Timing, again: Timing) -> float:
    """How far two timings of one thing lie apart, relative to the faster."""
    return max(first.median, again.median) / min(first.median, again.median) - 1


def interleave_until_quiet(
    candidates: Mapping[str, Callable[[], object]], twins: Mapping[str, str], seconds: float
) -> tuple[dict[str, Timing], list[float]]:
    """Timings of the quietest attempt, and the largest gap between ``twins`` in every attempt.

    ``twins`` are candidates that are one thing under two names. The group is void if no attempt is quiet.
    """
    attempts: list[tuple[float, dict[str, Timing]]] = []
    while not attempts or (attempts[-1][0] > LARGEST_GAP and len(attempts) < ATTEMPTS):
        timings = interleave(candidates, seconds)
        attempts.append((max(gap(timings[name], timings[twin]) for name, twin in twins.items()), timings))
    gaps = [largest for largest, _ in attempts]
    return attempts[gaps.index(min(gaps))][1], gaps
