"""One large memory: all threads against one, and what share of the machine's rates a call reaches."""

import inspect
import math
import random
import statistics
from collections.abc import Callable, Collection
from typing import Any

import torch

import fastkm
from benchmarks.cases import NATIVE, map_episode
from benchmarks.ceiling import COPIED, update_in_block_form
from benchmarks.sweep.grid import LONGEST_CODE, Cell, select
from benchmarks.sweep.measure import Truth, make_inputs
from fastkm.cli.console import progress
from fastkm.testing.operations import computation
from fastkm.testing.timing import LONG, SHORTEST, WARM_UP, clock, no_collection

SIZES = (128, 256, 512, 1024, 2048, 4096)
COUNTS = {"update_posterior": (1, 64, 256), "write": (1, 16), "read": (1, 32, 256)}
LEAST_ROUNDS, MOST_ROUNDS = 3, 21
PRODUCT = 2048  # rows of the square matrices whose product is timed
IN_PLACE = "update_posterior, out=state"
TITLE = (
    "One memory, C = K up to 2,048, float32: one thread against all. Shares are those of the best matrix product and "
    "copy with all threads; flops of an update are those of its block form, bytes each input and output once."
)
HEADERS = ("call", "K", "C", "T or Q", "1 thread ms", "all ms", "faster", "Gflop/s", "% product", "GB/s", "% copy", "")


def cells() -> list[Cell]:
    return [
        Cell(operation, K, min(K, LONGEST_CODE), count, 1)
        for operation, counts in COUNTS.items()
        for count in counts
        for K in SIZES
    ]


def flops_of(cell: Cell) -> int:
    return update_in_block_form(cell.K, cell.C, cell.count) if cell.operation == "update_posterior" else cell.flops


def time_threads(call: Callable[[], object], threads: int, seconds: float) -> dict[int, float]:
    """Seconds a call with one thread and with all, in turns whose order is drawn anew."""
    samples: dict[int, list[float]] = {1: [], threads: []}
    costs = {}
    for n in samples:
        torch.set_num_threads(n)
        call()
        costs[n] = clock(call)
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, round(seconds / (sum(costs.values()) + len(costs) * WARM_UP))))
    draw = random.Random(0)
    with no_collection():
        for _ in range(rounds):
            for n in draw.sample(list(samples), len(samples)):
                torch.set_num_threads(n)
                for _ in range(math.ceil(WARM_UP / costs[n]) if costs[n] < LONG else 0):
                    call()
                samples[n].append(clock(call, max(1, math.ceil(SHORTEST / costs[n]))))
    torch.set_num_threads(threads)
    return {n: statistics.median(taken) for n, taken in samples.items()}


def measure(
    threads: int, seconds: float, operations: Collection[str] = (), rows: Collection[int] = ()
) -> list[dict[str, Any]]:
    """All cells, or those with one of these operations and numbers of rows."""
    chosen, records = select(cells(), operations, rows), []
    in_place = [cell for cell in chosen if cell.operation == "update_posterior" and cell.count == 1 and cell.K >= 512]
    with progress("one memory", len(chosen) + len(in_place) + 1, seconds=10) as start:
        start("copy and product")
        records += measure_machine(threads, seconds)
        for cell in chosen:
            start(str(cell))
            records.append(measure_cell(cell, threads, seconds))
        if "out" in inspect.signature(fastkm.update_posterior).parameters:
            for cell in in_place:
                start(f"{cell}, out")
                records.append(measure_in_place(cell, threads, seconds))
    return records


def record_of(call: str, sizes: tuple, seconds: dict[int, float], flops: int, moved: int, note: str = "") -> dict:
    one, *more = seconds.values()
    return {"call": call, "sizes": sizes, "one": one, "all": more[-1] if more else one, "flops": flops, "bytes": moved,
            "note": note}  # fmt: skip


def measure_machine(threads: int, seconds: float) -> list[dict[str, Any]]:
    """What a second thread is worth to a copy and to a product, of which the calls are made."""
    source, target = torch.ones(COPIED // 4), torch.zeros(COPIED // 4)
    a, b, c = (torch.rand(PRODUCT, PRODUCT) for _ in range(3))
    copied = time_threads(lambda: target.copy_(source), threads, seconds)
    multiplied = time_threads(lambda: torch.mm(a, b, out=c), threads, seconds)
    sizes = (PRODUCT, PRODUCT, PRODUCT)
    return [record_of("copy of 128 MiB", ("", "", ""), copied, 0, 2 * COPIED),
            record_of("matrix product", sizes, multiplied, 2 * PRODUCT**3, 0)]  # fmt: skip


def measure_cell(cell: Cell, threads: int, seconds: float) -> dict[str, Any]:
    """Checked first: right, and the same bits with one thread and with all."""
    e = make_inputs(cell)
    truth, form = Truth(cell, e), computation(cell.case)
    call, results = form.bind(e, None), []
    for n in (1, threads):
        torch.set_num_threads(n)
        results.append(form.fields(call()))
    wrong = truth.error(NATIVE, call()) > truth.allowed(NATIVE)
    differ = any(not torch.equal(x, y) for x, y in zip(*(result.values() for result in results), strict=True))
    note = "WRONG" if wrong else "bits differ" if differ else ""
    sizes = (cell.K, cell.C, cell.count)
    return record_of(cell.operation, sizes, time_threads(call, threads, seconds), flops_of(cell), cell.bytes, note)


def measure_in_place(cell: Cell, threads: int, seconds: float) -> dict[str, Any]:
    """One pattern after the other into the memory itself."""
    e = make_inputs(cell)
    truth, state = Truth(cell, e), map_episode(torch.clone, e).prior
    result = fastkm.update_posterior(state, e.weights, e.values, e.noise_var, out=state)
    wrong = truth.error(NATIVE, result) > truth.allowed(NATIVE)
    # Much noise: after thousands of calls the variance along the pattern still has digits.
    noise_var = torch.full_like(e.noise_var, 100.0)

    def call() -> None:
        fastkm.update_posterior(state, e.weights, e.values, noise_var, out=state)

    moved = 2 * sum(x.numel() * x.element_size() for x in state)
    sizes = (cell.K, cell.C, cell.count)
    taken = time_threads(call, threads, seconds)
    return record_of(IN_PLACE, sizes, taken, flops_of(cell), moved, "WRONG" if wrong else "")


def row(record: dict[str, Any], ceiling: dict[str, float]) -> tuple[str, ...]:
    sizes = tuple(f"{size}" for size in record["sizes"])
    times = f"{1e3 * record['one']:.4g}", f"{1e3 * record['all']:.4g}", f"{record['one'] / record['all']:.2f}"
    flops, moved = record["flops"] / record["all"], record["bytes"] / record["all"]
    worked = (f"{flops / 1e9:.0f}", f"{flops / ceiling['product']:.0%}") if record["flops"] else ("", "")
    carried = (f"{moved / 1e9:.1f}", f"{moved / ceiling['bandwidth']:.0%}") if record["bytes"] else ("", "")
    return (record["call"], *sizes, *times, *worked, *carried, record["note"])
