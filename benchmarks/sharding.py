"""Memories on several processes beside one process: `python -m benchmarks.sharding`.

One memory of 1,024 rows and 8,192 columns, float32, every process with one thread on a core of its own. First the
results are verified against float64, with even and with uneven shards; nothing is timed if one is wrong. Then the bytes
that a process writes to its sockets are counted and compared with the formula. Then a write and a read of one process
and of all processes are timed in turns. At last a call of all processes is split into what a rank does for its own
columns, what every rank repeats, and what moves; the split says how much faster more ranks can be.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastkm
from fastkm import MemoryState
from fastkm.distributed import ranks as ranks_of_fastkm
from fastkm.distributed import read_sharded, reading, write_sharded, writing
from fastkm.distributed.ranks import LENGTH, Ranks

NOISE_VAR, RIDGE = 1.0, 1.0
# What a message of gloo holds beside its numbers: 48 bytes a segment, and every collective has some segments a rank.
PROTOCOL = 2048  # bytes a call, at most
SETTLE = 0.3  # seconds until the threads of gloo have written what they have to write


class Sizes(NamedTuple):
    K: int
    C: int
    T: int
    Q: int


class Shared(NamedTuple):
    """What the processes share of a run."""

    sizes: Sizes
    size: int
    rounds: int
    meet: str


def numbers_sent(operation: str, sizes: Sizes) -> int:
    """How many numbers the all-reduce of a call sums, for one memory."""
    K, _, T, Q = sizes
    return (K + T) ** 2 if operation == "write" else K * K + K * Q


def bytes_sent(operation: str, sizes: Sizes, size: int) -> float:
    """What a rank sends in a call: its header to all others, and 2 (n − 1)/n of the numbers, as a ring does."""
    return (size - 1) * 8 * LENGTH + 2 * (size - 1) / size * 4 * numbers_sent(operation, sizes)


def make_memory(sizes: Sizes) -> tuple[MemoryState, Tensor, Tensor]:
    """The same on every rank: a memory, patterns, and queries that are damaged patterns."""
    K, C, T, Q = sizes
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, K, C, generator=generator)
    values = torch.randn(1, T, C, generator=generator)
    queries = values[:, torch.arange(Q) % T] + 0.3 * torch.randn(1, Q, C, generator=generator)
    return MemoryState(mean, torch.eye(K).unsqueeze(0)), values, queries


def own_columns(C: int, rank: int, size: int, uneven: bool) -> slice:
    """Equal parts, or one twice as wide as each of the others, and a column more."""
    parts = [1] * size if not uneven else [2] + [1] * (size - 1)
    ends = [0] + [C * sum(parts[: r + 1]) // sum(parts) + (uneven and r < size - 1) for r in range(size)]
    return slice(ends[rank], ends[rank + 1])


def calls_of(state: MemoryState, values: Tensor, queries: Tensor, mine: slice | None) -> dict[str, Callable[[], Any]]:
    """A write and a read of this process alone, or of its columns with the other ranks."""
    if mine is None:
        return {
            "write": lambda: fastkm.write(state, values, NOISE_VAR, RIDGE),
            "read": lambda: fastkm.read(state.mean, queries, RIDGE),
        }
    own = MemoryState(state.mean[..., mine].contiguous(), state.cov)
    own_values, own_queries = values[..., mine].contiguous(), queries[..., mine].contiguous()
    return {
        "write": lambda: write_sharded(own, own_values, NOISE_VAR, RIDGE),
        "read": lambda: read_sharded(own.mean, own_queries, RIDGE),
    }


def fields(result: Any) -> dict[str, Tensor]:
    state, *rest = result
    if isinstance(state, MemoryState):
        return {"mean": state.mean, "cov": state.cov, **dict(zip(("weights", "s", "kl"), rest, strict=True))}
    return {"values": state, "weights": rest[0]}


def error(found: Tensor, truth: Tensor) -> float:
    """The largest, relative to the largest entry."""
    return ((found.double() - truth).abs().max() / truth.abs().max()).item() if found.numel() else 0.0


def verify(memory: tuple, rank: int, size: int) -> None:
    """The errors of one process and of all; ends the run if a shard is worse than the rounding of a sum explains."""
    wide = [x.double() for x in (memory[0].mean, memory[0].cov, *memory[1:])]
    exact = calls_of(MemoryState(*wide[:2]), *wide[2:], None)
    one = calls_of(*memory, None)
    for uneven in (False, True):
        mine = own_columns(memory[1].shape[2], rank, size, uneven)
        for name, call in calls_of(*memory, mine).items():
            truth, alone, found = (fields(run()) for run in (exact[name], one[name], call))
            for field, x in found.items():
                cut = mine if field in ("mean", "values") else slice(None)
                errors = torch.tensor([error(x, truth[field][..., cut]), error(alone[field], truth[field])])
                dist.all_reduce(errors, op=dist.ReduceOp.MAX)
                allowed = 2 * (errors[1].item() + size * torch.finfo(torch.float32).eps)
                if rank == 0:
                    shards = "uneven" if uneven else "even"
                    print(f"  {name:<6} {field:<8} {shards:<7} {errors[0]:9.1e} {errors[1]:9.1e} {allowed:9.1e}")
                if errors[0] > allowed:
                    sys.exit(f"wrong, so that nothing was timed: {name}, {field}")


def written() -> int:
    """Bytes that this process, all its threads included, has handed to the system to write."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split("wchar: ")[1].split()[0])


def count_bytes(calls: dict[str, Callable[[], Any]], sizes: Sizes, rank: int, size: int) -> None:
    for name, call in calls.items():
        dist.barrier()
        time.sleep(SETTLE)
        before = written()
        call()
        time.sleep(SETTLE)
        sent = torch.tensor([written() - before], dtype=torch.float64)
        dist.all_reduce(sent, op=dist.ReduceOp.MAX)
        formula = bytes_sent(name, sizes, size)
        if rank == 0:
            beside = sent.item() - formula
            print(f"  {name:<6} {sent.item():14,.0f} {formula:14,.0f} {beside:9,.0f}")
            if not 0 <= beside <= PROTOCOL:
                sys.exit(f"{name} sends other bytes than the formula says")


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that passed, and seconds that this process computed."""
    wall, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - busy


def time_calls(memory: tuple, mine: slice, rank: int, rounds: int) -> None:
    """One process, while the others wait, and all processes, in turns."""
    one, all_ranks = calls_of(*memory, None), calls_of(*memory, mine)
    for name in one:
        times: dict[str, list[tuple[float, float]]] = {"one": [], "all": []}
        for _ in range(rounds + 1):  # the first is a warm-up
            dist.barrier()
            if rank == 0:
                times["one"].append(timed(one[name]))
            dist.barrier()
            took = torch.tensor(timed(all_ranks[name]), dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            times["all"].append((took[0].item(), took[1].item()))
        if rank == 0:
            row = []
            for kind in (0, 1):
                alone, shared = (statistics.median(x[kind] for x in times[who][1:]) for who in ("one", "all"))
                row.append(f"{alone * 1e3:9.1f} {shared * 1e3:9.1f} {alone / shared:6.2f}×")
            print(f"  {name:<6} {'   '.join(row)}", flush=True)


# The parts of a call in their order. What a rank does for its own columns stands at both ends.
OWN_PRODUCTS, HEADER, SUM, REPEATED, OWN_COLUMNS = PARTS = (
    "inner products of own columns",
    "checksums and header",
    "all-reduce",
    "repeated on every rank",
    "result of own columns",
)


@contextlib.contextmanager
def boundaries(seconds: dict[str, float]) -> Iterator[None]:
    """Add to ``seconds`` what this thread computes in each part of the calls inside."""
    before = [OWN_PRODUCTS, time.thread_time()]

    def enter(part: str) -> None:
        now = time.thread_time()
        seconds[before[0]] += now - before[1]
        before[:] = part, now

    def patched(owner: Any, name: str, entry: str | None, after: str) -> Any:
        function = getattr(owner, name)

        def timed(*given: Any, **options: Any) -> Any:
            if entry:
                enter(entry)
            result = function(*given, **options)
            enter(after)
            return result

        return mock.patch.object(owner, name, timed)

    with (
        patched(ranks_of_fastkm, "checksum", HEADER, HEADER),
        patched(Ranks, "_agree", HEADER, REPEATED),
        patched(Ranks, "sum", SUM, REPEATED),
        patched(writing.native, "write_gram", None, OWN_COLUMNS),
        patched(reading, "iterate", None, OWN_COLUMNS),
    ):
        yield
        enter(OWN_PRODUCTS)


def split(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """The median of the seconds that this rank computes in each part of a call."""
    found: list[dict[str, float]] = []
    for _ in range(rounds + 1):  # the first is a warm-up
        dist.barrier()
        found.append(dict.fromkeys(PARTS, 0.0))
        with boundaries(found[-1]):
            call()
    return {part: statistics.median(one[part] for one in found[1:]) for part in PARTS}


def print_split(name: str, parts: dict[str, float], sizes: Sizes, size: int) -> None:
    moved = bytes_sent(name, sizes, size)
    for part, seconds in parts.items():
        sent = f"{moved:14,.0f} bytes" if part == SUM else ""
        print(f"  {name:<6} {part:<30} {seconds * 1e3:9.1f}  {seconds / sum(parts.values()):6.1%} {sent}")
    divided = parts[OWN_PRODUCTS] + parts[OWN_COLUMNS]
    repeated = parts[HEADER] + parts[REPEATED]
    whole = repeated + size * divided
    bounds = [f"{whole / (repeated + parts[SUM] + divided):.2f}× with the sum"] + [
        f"{whole / (repeated + size * divided / n):.2f}× on {n}" for n in (size, 4 * size)
    ]
    print(
        f"  {name:<6} repeated: {repeated / whole:.1%} of one rank's work; at most {', '.join(bounds)} ranks",
        flush=True,
    )


def work(rank: int, shared: Shared) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    limit = timedelta(minutes=5)
    dist.init_process_group(
        "gloo", init_method=f"file://{shared.meet}", rank=rank, world_size=shared.size, timeout=limit
    )
    memory = make_memory(shared.sizes)
    if rank == 0:
        K, C, T, Q = shared.sizes
        print(f"K {K}, C {C}, T {T}, Q {Q}, float32; {shared.size} processes of one thread, {len(cores)} cores")
        print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
        print("largest error relative to float64: of all processes, of one process, allowed")
    verify(memory, rank, shared.size)
    mine = own_columns(shared.sizes.C, rank, shared.size, False)
    if rank == 0:
        print("bytes that a rank writes to its sockets in a call: counted, by the formula, the rest (headers of gloo)")
    count_bytes(calls_of(*memory, mine), shared.sizes, rank, shared.size)
    if rank == 0:
        print("ms a call, median: one process, all processes, ratio; then the same of time that a process computed")
    time_calls(memory, mine, rank, shared.rounds)
    if rank == 0:
        print("ms that the thread of a rank computes in the parts of a call, median, and their share")
    for name, call in calls_of(*memory, mine).items():
        parts = split(call, shared.rounds)
        if rank == 0:
            print_split(name, parts, shared.sizes, shared.size)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1024, help="K")
    parser.add_argument("--columns", type=int, default=8192, help="C")
    parser.add_argument("--patterns", type=int, default=64, help="T")
    parser.add_argument("--queries", type=int, default=64, help="Q")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    sizes = Sizes(options.rows, options.columns, options.patterns, options.queries)
    with tempfile.TemporaryDirectory() as folder:
        shared = Shared(sizes, options.ranks, options.rounds, f"{folder}/meet")
        mp.spawn(work, (shared,), nprocs=options.ranks)


if __name__ == "__main__":
    main()
