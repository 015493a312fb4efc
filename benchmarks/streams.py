"""A stream beside the functions: how exact after many patterns, and how fast.

``python -m benchmarks.streams drift`` writes pattern after pattern into a stream and, one call each, by the function,
both in float32, and prints at every power of ten how far each is from the same in float64.

``python -m benchmarks.streams time`` prints what a pattern written alone, an update in place and a read of one query
take beside the functions, and how fast memory is copied.

``python -m benchmarks.streams mixed`` reads one query after the other, with a write in between now and then, and prints
how long both take: the median, and what 99 in 100 calls stay below.
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

import fastkm
from benchmarks.timing import keep_freed_memory, pin
from fastkm.state import MemoryState
from fastkm.testing.timing import clock, time_in_turn


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).abs().max() / truth.abs().max())


def start(K: int, C: int, seed: int = 0, scale: float = 1.0) -> tuple[MemoryState, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return MemoryState(scale * torch.randn(1, K, C, generator=generator), torch.eye(K).unsqueeze(0)), generator


def drift(K: int, C: int, patterns: int, noise_var: float, ridge: float, *, functions: bool) -> None:
    """Print the errors of the stream and of the function, and how often the inverse was computed anew."""
    state, generator = start(K, C)
    stream = fastkm.MemoryStream(state, noise_var, ridge)
    exact = fastkm.MemoryStream(MemoryState(*(x.double() for x in state)), noise_var, ridge)
    print(f"K {K}, C {C}, σ² {noise_var}, λ {ridge}: largest error relative to float64, of R and of U")
    print(f"{'patterns':>10} {'stream R':>10} {'stream U':>10} {'write R':>10} {'write U':>10}  computed anew")
    done, chunk = 0, 100
    marks = {10**n for n in range(2, 10)} | {patterns}
    while done < patterns:
        count = min(chunk, patterns - done)
        values = torch.randn(1, count, C, generator=generator)
        stream.write(values), exact.write(values.double())
        for one in values.split(1, 1) if functions else ():
            state = fastkm.write(state, one, noise_var, ridge).state
        done += count
        if done in marks:
            errors = [error(got, truth) for got, truth in zip(stream.state, exact.state, strict=True)]
            errors += [error(got, truth) for got, truth in zip(state, exact.state, strict=True)] if functions else []
            print(f"{done:>10,} " + " ".join(f"{x:>10.2g}" for x in errors) + f"  {int(stream.refreshes)}", flush=True)


def calls(K: int, C: int) -> dict[str, Callable[[], object]]:
    state, generator = start(K, C, scale=C**-0.5)
    value, weights = torch.randn(1, 1, C, generator=generator), torch.randn(1, 1, K, generator=generator) / K**0.5
    stream = fastkm.MemoryStream(state, 1.0, 1.0)
    own = MemoryState(*(x.clone() for x in state))
    copies = [(x, torch.empty_like(x)) for x in state]
    return {
        "copy of the memory": lambda: [to.copy_(x) for x, to in copies],
        "update_posterior": lambda: fastkm.update_posterior(state, weights, value, 1.0),
        "update_posterior, out": lambda: fastkm.update_posterior(own, weights, value, 1.0, out=own),
        "stream.update": lambda: stream.update(weights, value),
        "write": lambda: fastkm.write(state, value, 1.0, 1.0),
        "stream.write": lambda: stream.write(value),
        "read": lambda: fastkm.read(state.mean, value, 1.0),
        "stream.read": lambda: stream.read(value),
        "read, n = 10": lambda: fastkm.read(state.mean, value, 1.0, num_iters=10),
        "stream.read, n = 10": lambda: stream.read(value, 10),
    }


def time(K: int, C: int, seconds: float) -> None:
    """Print the time of every call, and the bytes it must read and write against what a copy moves in that time."""
    timings = time_in_turn(calls(K, C), seconds)
    moved = 8 * K * (K + C)  # bytes; R and U are read and written
    copied = moved / timings["copy of the memory"].median
    print(f"K {K}, C {C}, one memory, one pattern or query, float32; a copy moves {copied / 1e9:.1f} GB/s")
    for name, timing in timings.items():
        share = f"  {moved / timing.median / copied:6.0%} of the copy" if "update" in name else ""
        print(f"  {name:<24} {timing.median * 1e6:10.1f} µs{share}")


def mixed(K: int, C: int, seconds: float, reads: int) -> None:
    """Print the latencies of writes, and of the ``reads`` of one query after each."""
    state, generator = start(K, C, scale=C**-0.5)
    stream, took = fastkm.MemoryStream(state, 1.0, 1.0), {"write": [], "read": []}
    values = torch.randn(64, 1, 1, C, generator=generator)
    ends = perf_counter() + seconds
    while perf_counter() < ends:
        for value in values:
            took["write"].append(clock(lambda value=value: stream.write(value)))
            took["read"] += [clock(lambda value=value: stream.read(value)) for _ in range(reads)]
    print(f"K {K}, C {C}, float32: a write, then {reads} reads of one query; {int(stream.refreshes)} computed anew")
    for name, times in took.items():
        median, high = (torch.tensor(times).quantile(q).item() for q in (0.5, 0.99))
        print(f"  {name:<6} {len(times):>8,} calls, p50 {median * 1e6:8.1f} µs, p99 {high * 1e6:8.1f} µs")
    print(f"  {len(took['read']) / sum(sum(times) for times in took.values()):,.0f} reads a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["drift", "time", "mixed"])
    parser.add_argument("--rows", type=int, nargs="+", default=[8], help="K")
    parser.add_argument("--columns", type=int, nargs="+", default=[12], help="C, one for each K")
    parser.add_argument("--patterns", type=int, default=1_000_000)
    parser.add_argument("--noise-var", type=float, default=1.0)
    parser.add_argument("--ridge", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for every call that is timed")
    parser.add_argument("--reads", type=int, default=8, help="of one query, after every write")
    parser.add_argument("--no-functions", action="store_true", help="leave out the function, which is slow for large K")
    options = parser.parse_args()
    print(f"threads: {pin(options.threads)}; freed memory: {keep_freed_memory()}")
    for K, C in zip(options.rows, options.columns, strict=True):
        if options.what == "time":
            time(K, C, options.seconds)
        elif options.what == "mixed":
            mixed(K, C, options.seconds, options.reads)
        else:
            functions = not options.no_functions
            drift(K, C, options.patterns, options.noise_var, options.ridge, functions=functions)


if __name__ == "__main__":
    main()
