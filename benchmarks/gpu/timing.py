"""Seconds a call on the device: with cold and hot caches, called from Python and replayed as a CUDA graph."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import probe

MODES = ("cold", "hot", "graph cold", "graph hot")
LEAST_ROUNDS = 5
LONGEST = 0.2  # seconds that the rounds of one mode take, unless the least rounds take longer
COPIED = 2**30  # bytes


class Stopwatch:
    """Times calls; between those of a cold mode it overwrites the L2 cache."""

    def __init__(self, rounds: int):
        self.rounds = rounds
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(4 * cache, dtype=torch.uint8, device=probe.DEVICE)

    def once(self, call: Callable[[], object], cold: bool) -> float:
        if cold:
            self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def time(self, call: Callable[[], object], cold: bool) -> dict[str, float]:
        """Median and quartiles; three calls before are not counted."""
        usual = min(self.once(call, cold) for _ in range(3))
        rounds = max(LEAST_ROUNDS, min(self.rounds, int(LONGEST / max(usual, 1e-6))))
        times = [self.once(call, cold) for _ in range(rounds)]
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
        return {"median": median, "lower": lower, "upper": upper, "rounds": rounds}

    def measure(self, call: Callable[[], object]) -> dict[str, Any]:
        """The seconds of every mode, and why there is no graph where there is none."""
        seconds = {"cold": self.time(call, True), "hot": self.time(call, False)}
        try:
            replay = captured(call)
            seconds |= {"graph cold": self.time(replay, True), "graph hot": self.time(replay, False)}
        except Exception as problem:  # a call that waits for the host cannot be captured
            torch.cuda.synchronize()  # raises where it was the device that failed
            return {"seconds": seconds, "no_graph": f"{type(problem).__name__}: {str(problem).splitlines()[0]}"}
        return {"seconds": seconds}

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy on the device."""
        source, to = (torch.empty(COPIED, dtype=torch.uint8, device=probe.DEVICE) for _ in range(2))
        return 2 * COPIED / self.time(lambda: to.copy_(source), False)["median"]


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
