"""What makes timings comparable beside the timer of :mod:`fastkm.testing.timing`: cores, memory, a second timing."""

import ctypes
import os
import platform
from collections.abc import Callable, Mapping

import torch

from fastkm.testing.timing import Timing, time_in_turn

LARGEST_GAP = 0.05  # between two timings of one thing; nothing is concluded beyond it
ATTEMPTS = 3


def pin(threads: int) -> str:
    """Bind this process to as many cores as ``threads``; returns both in words."""
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return f"{threads}, not bound to cores: this system has no sched_setaffinity"
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)
    return f"{threads} on cores {', '.join(map(str, cores))}"


def keep_freed_memory() -> str:
    """Let the process keep the memory it frees, for every candidate alike; returns that in words.

    By default glibc returns large blocks to the system, and every call that returns megabytes waits for the kernel to
    clear its pages.
    """
    if platform.libc_ver()[0] != "glibc":
        return "as the system's allocator has it"
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    return "kept by the process (glibc: M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1)"


def gap(first: Timing, again: Timing) -> float:
    """How much two timings of one thing differ, relative to the faster."""
    return max(first.median, again.median) / min(first.median, again.median) - 1


def time_until_quiet(
    candidates: Mapping[str, Callable[[], object]], twins: Mapping[str, str], seconds: float
) -> tuple[dict[str, Timing], list[float]]:
    """Timings of the quietest attempt, and the largest gap between ``twins`` in every attempt.

    ``twins`` are candidates that are one thing under two names. The timings are void if no attempt is quiet.
    """
    attempts: list[tuple[float, dict[str, Timing]]] = []
    while not attempts or (attempts[-1][0] > LARGEST_GAP and len(attempts) < ATTEMPTS):
        timings = time_in_turn(candidates, seconds)
        attempts.append((max(gap(timings[name], timings[twin]) for name, twin in twins.items()), timings))
    gaps = [largest for largest, _ in attempts]
    return attempts[gaps.index(min(gaps))][1], gaps
