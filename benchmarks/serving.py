"""A memory that answers queries while patterns are written into it: `make serving`.

One memory of 512 rows and codes of 768 numbers, one query or pattern a call. First what single calls take, in turns.
Then three servers do the same job for some seconds: reads alone, and one write after every 100, 10 and 1 of them.
Writes results/serving/serving.json, serving.md and serving.png.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkm
from benchmarks.sweep.grid import Cell
from benchmarks.sweep.measure import FORM_ROUNDINGS, make_inputs
from benchmarks.timing import LARGEST_GAP, gap, keep_freed_memory, pin, time_until_quiet
from fastkm import MemoryState
from fastkm._files import replace_file, write_text
from fastkm.cli.console import add_threads, check_writable, duration, exit_status, markdown_table, show_table
from fastkm.cli.machine import machine
from fastkm.cli.picture import INK, QUIET
from fastkm.testing.extras import UserError, import_extra
from fastkm.testing.verification import relative_errors

ROWS, CODE = 512, 768
NOISE_VAR, RIDGE = 1.0, 1.0
POOL = 1024  # different queries and patterns
CHECKED = 32  # patterns that are written, and queries that are read, before anything is timed
MIXES = (0, 100, 10, 1)  # reads between two writes; 0: reads alone
BINS = 25  # of a mix, in the picture
RESULTS = ("serving.json", "serving.md", "serving.png")
MOST = {"a pattern": 1 / 10, "a query": 1 / 20}  # of the time of the function that starts from nothing
CALLS = ("call", "ms", "± %", "of", "share", "at most", "")
SERVICE = ("server", "reads a write", "queries / s", "read p50 ms", "read p99 ms", "write p50 ms", "write p99 ms")
COLOURS = {"MemoryStream": "#123f52", "factored reads": "#2b9a8f", "functions": "#d9624f"}


# ---- servers -------------------------------------------------------------------------------------------------------


class Functions:
    """Each call starts from the memory alone."""

    def __init__(self, state: MemoryState) -> None:
        self.state = state

    def read(self, query: Tensor) -> Tensor:
        return fastkm.read(self.state.mean, query, RIDGE).values

    def write(self, pattern: Tensor) -> None:
        self.state = fastkm.write(self.state, pattern, NOISE_VAR, RIDGE).state


class FactoredReads(Functions):
    """The memory is factored once after a write, at the first read."""

    factor: Any = None

    def read(self, query: Tensor) -> Tensor:
        if self.factor is None:
            self.factor = fastkm.factor_addressing(self.state.mean, RIDGE)
        return fastkm.read_factored(self.factor, query).values

    def write(self, pattern: Tensor) -> None:
        super().write(pattern)
        self.factor = None


class Stream:
    """What reads and writes need is carried from one to the next."""

    def __init__(self, state: MemoryState) -> None:
        self.stream = fastkm.MemoryStream(state, NOISE_VAR, RIDGE)

    def read(self, query: Tensor) -> Tensor:
        return self.stream.read(query).values

    def write(self, pattern: Tensor) -> None:
        self.stream.write(pattern)


SERVERS: dict[str, Callable[[MemoryState], Any]] = {
    "MemoryStream": Stream,
    "factored reads": FactoredReads,
    "functions": Functions,
}


def check(state: MemoryState, queries: Sequence[Tensor], patterns: Sequence[Tensor]) -> dict[str, float]:
    """The errors of all servers after some writes, relative to the largest entry; raises if one is wrong.

    The truth is the functions in float64. The allowance is that of the sweep for a form that rounds in its own order.
    """
    exact = Functions(MemoryState(*(x.double() for x in state)))
    servers = {name: make(state) for name, make in SERVERS.items()}
    for server in (exact, *servers.values()):
        for pattern in patterns:
            server.write(pattern.to(exact.state.mean.dtype if server is exact else pattern.dtype))
    truth = torch.cat([exact.read(query.double()) for query in queries])
    errors = {}
    for name, server in servers.items():
        answers = torch.cat([server.read(query) for query in queries])
        errors[name] = relative_errors({"values": answers}, {"values": truth})["values"]
    rows, code = state.mean.shape[1:]
    allowed = FORM_ROUNDINGS * torch.finfo(torch.float32).eps * math.sqrt(rows + code + len(patterns))
    if wrong := {name: error for name, error in errors.items() if not error <= allowed}:
        raise UserError(f"wrong, so that nothing was timed: {wrong}, at most {allowed:.1e}")
    return errors


# ---- single calls --------------------------------------------------------------------------------------------------


def time_calls(state: MemoryState, queries: Sequence[Tensor], patterns: Sequence[Tensor], seconds: float) -> list[dict]:
    """Each call, and its share of the call that starts from nothing."""
    stream, factor = Stream(state), fastkm.factor_addressing(state.mean, RIDGE)
    functions, turn = Functions(state), itertools.count()

    def query() -> Tensor:
        return queries[next(turn) % len(queries)]

    def pattern() -> Tensor:
        return patterns[next(turn) % len(patterns)]

    calls: dict[str, Callable[[], object]] = {
        "write, T = 1": lambda: fastkm.write(state, pattern(), NOISE_VAR, RIDGE),
        "MemoryStream.write": lambda: stream.write(pattern()),
        "read": lambda: functions.read(query()),
        "read_factored": lambda: fastkm.read_factored(factor, query()),
        "MemoryStream.read": lambda: stream.read(query()),
        "factor_addressing": lambda: fastkm.factor_addressing(state.mean, RIDGE),
    }
    twins = {name: f"{name}, again" for name in calls}
    timings, _ = time_until_quiet({**calls, **{twins[name]: call for name, call in calls.items()}}, twins, seconds)
    compared = {
        "MemoryStream.write": ("write, T = 1", MOST["a pattern"]),
        "read_factored": ("read", MOST["a query"]),
        "MemoryStream.read": ("read", None),
    }
    records: list[dict[str, Any]] = []
    for name in calls:
        base, at_most = compared.get(name, (None, None))
        share = None if base is None else timings[name].median / timings[base].median
        differ = gap(timings[name], timings[twins[name]])
        own = {"call": name, "seconds": timings[name].median, "gap": differ}
        records.append({**own, "of": base, "share": share, "at_most": at_most})
    return records


# ---- the service ---------------------------------------------------------------------------------------------------


class Service(NamedTuple):
    """What a server did with one mix: when each call ended, in seconds from the beginning, and how long it took."""

    server: str
    mix: int
    reads: list[tuple[float, float]]
    writes: list[tuple[float, float]]
    seconds: float


def serve(
    name: str, server: Any, mix: int, queries: Sequence[Tensor], patterns: Sequence[Tensor], seconds: float
) -> Service:
    """Read, and write after every ``mix`` reads, for so many seconds."""
    reads: list[tuple[float, float]] = []
    writes: list[tuple[float, float]] = []
    begin = now = time.perf_counter()
    while now - begin < seconds:
        server.read(queries[len(reads) % len(queries)])
        before, now = now, time.perf_counter()
        reads.append((now - begin, now - before))
        if mix and len(reads) % mix == 0:
            server.write(patterns[len(writes) % len(patterns)])
            before, now = now, time.perf_counter()
            writes.append((now - begin, now - before))
    return Service(name, mix, reads, writes, now - begin)


def percentile(calls: Sequence[tuple[float, float]], share: float) -> float:
    """The time within which ``share`` of the calls ended; NaN without calls."""
    times = sorted(taken for _, taken in calls)
    return times[max(0, math.ceil(share * len(times)) - 1)] if times else math.nan


def rates(service: Service, bins: int = BINS) -> list[float]:
    """Queries a second in each of ``bins`` equal parts of the time."""
    counts = [0] * bins
    for ended, _ in service.reads:
        counts[min(bins - 1, int(bins * ended / service.seconds))] += 1
    return [bins * count / service.seconds for count in counts]


def summary(service: Service) -> dict[str, Any]:
    told: dict[str, Any] = {
        "server": service.server,
        "mix": service.mix,
        "per_second": len(service.reads) / service.seconds,
    }
    for word, calls in (("read", service.reads), ("write", service.writes)):
        told |= {f"{word}s": len(calls), f"{word}_p50": percentile(calls, 0.5), f"{word}_p99": percentile(calls, 0.99)}
    return {**told, "rates": rates(service)}


# ---- what is said --------------------------------------------------------------------------------------------------


def call_row(record: dict[str, Any]) -> tuple[str, ...]:
    own = record["call"], f"{1e3 * record['seconds']:.4g}", f"{100 * record['gap']:.0f}"
    if record["share"] is None:
        return (*own, "", "", "", "")
    share = f"1/{1 / record['share']:.1f}"
    if record["at_most"] is None:
        return (*own, record["of"], share, "", "")
    verdict = "met" if record["share"] <= record["at_most"] else "MISSED"
    verdict = "void" if record["gap"] > LARGEST_GAP else verdict
    return (*own, record["of"], share, f"1/{1 / record['at_most']:.0f}", verdict)


def service_row(told: dict[str, Any]) -> tuple[str, ...]:
    latencies = (told[f"{word}_{p}"] for word in ("read", "write") for p in ("p50", "p99"))
    times = ("–" if math.isnan(seconds) else f"{1e3 * seconds:.3g}" for seconds in latencies)
    return (told["server"], mix_in_words(told["mix"]), f"{told['per_second']:,.0f}", *times)


def mix_in_words(mix: int) -> str:
    return f"{mix}" if mix else "reads alone"


def draw(services: Sequence[dict[str, Any]], machine: dict[str, Any], seconds: float, file: str) -> None:
    """Queries a second over time, and below them how long a query takes."""
    import_extra("matplotlib").use("Agg")
    plt = import_extra("matplotlib.pyplot")
    figure = plt.figure(figsize=(11, 7.6), facecolor="white")
    figure.text(0.03, 0.97, "One memory that answers queries while patterns are written", color=INK, size=16,
                weight="bold", va="top")  # fmt: skip
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    words = f"K = {ROWS}, C = {CODE}, float32, one query or pattern a call; {threads} on {machine['processor']}."
    figure.text(0.03, 0.925, words, color=QUIET, size=9.5, va="top")
    above, below = figure.add_axes((0.09, 0.43, 0.88, 0.4)), figure.add_axes((0.09, 0.08, 0.88, 0.25))
    for position, mix in enumerate(MIXES):
        for axes in (above, below):
            axes.axvspan(position, position + 1, color="#f4f5f7" if position % 2 else "white", zorder=0)
        words = f"one write after {mix} read{'s' * (mix > 1)}" if mix else "reads alone"
        above.text(position + 0.5, 1.03, words, color=INK, size=10, ha="center", transform=above.get_xaxis_transform())
        for offset, name in enumerate(SERVERS):
            found = next((s for s in services if (s["server"], s["mix"]) == (name, mix)), None)
            if found:
                draw_service(above, below, found, position, offset)
    for axes, title in ((above, "queries a second"), (below, "ms a query, p50 to p99")):
        style_axes(axes, title)
    times = [f"{seconds * position:g} s" for position in range(len(MIXES) + 1)]
    above.set_xticks(range(len(MIXES) + 1), times, color=QUIET, size=8.5)
    below.set_xticks([])
    above.legend(loc="lower left", frameon=False, fontsize=10, labelcolor=INK, ncols=len(SERVERS))
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def draw_service(above: Any, below: Any, told: dict[str, Any], position: int, offset: int) -> None:
    colour, bins = COLOURS[told["server"]], len(told["rates"])
    x = [position + (i + 0.5) / bins for i in range(bins)]
    shown = [rate if rate > 0 else math.nan for rate in told["rates"]]  # a bin without an answer is a gap
    above.semilogy(
        x, shown, ".-", color=colour, linewidth=2, markersize=4, label=told["server"] if position == 0 else None
    )
    middle, ends = position + 0.2 + 0.3 * offset, [1e3 * told["read_p50"], 1e3 * told["read_p99"]]
    below.semilogy([middle, middle], ends, color=colour, linewidth=7, alpha=0.45, solid_capstyle="round")
    below.semilogy([middle], ends[:1], "o", color=colour, markersize=7)
    for value, where, shift in ((ends[0], "top", -7), (ends[1], "bottom", 6)):
        below.annotate(f"{value:.3g}", (middle, value), (0, shift), textcoords="offset points", color=INK, size=8,
                       ha="center", va=where)  # fmt: skip


def style_axes(axes: Any, title: str) -> None:
    axes.set_ylabel(title, color=INK, size=10)
    axes.set_xlim(0, len(MIXES))
    axes.grid(True, axis="y", which="major", color="#d9dce2", linewidth=0.7)
    axes.tick_params(colors=QUIET, labelsize=8.5, length=0, which="both")
    axes.yaxis.set_minor_locator(import_extra("matplotlib.ticker").NullLocator())
    axes.yaxis.set_major_formatter(import_extra("matplotlib.ticker").FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.margins(y=0.25)
    for spine in axes.spines.values():
        spine.set_visible(False)


# ---- the command ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make serving", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=duration, default=4.0, help="of each server and mix (default: %(default)s)")
    add_threads(parser)
    parser.add_argument("--output", type=Path, default=Path("results/serving"), metavar="FOLDER")
    return parser


def measure(seconds: float) -> dict[str, Any]:
    e = make_inputs(Cell("read", ROWS, CODE, 1, 1))
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(2, POOL, 1, 1, CODE, generator=generator) / math.sqrt(CODE)
    queries, patterns = codes[0].unbind(), codes[1].unbind()
    data: dict[str, Any] = {"errors": check(e.prior, queries[:CHECKED], patterns[:CHECKED])}
    data["calls"] = time_calls(e.prior, queries, patterns, seconds)
    data["services"] = []
    servers = {name: make(e.prior) for name, make in SERVERS.items()}
    for mix in MIXES:
        for name, server in servers.items():
            server.read(queries[0])  # what a first read computes is not the service's
            data["services"].append(summary(serve(name, server, mix, queries, patterns, seconds)))
    return data


def run(options: argparse.Namespace) -> int:
    check_writable(*(options.output / name for name in RESULTS))
    import_extra("matplotlib")
    pinned = pin(options.threads)
    about = {**machine(), "pinned": pinned, "freed memory": keep_freed_memory()}
    about |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    print(*(f"{name:<18} {value}" for name, value in about.items()), sep="\n", flush=True)
    data = {"machine": about, "seconds": options.seconds, **measure(options.seconds)}
    calls, served = [call_row(r) for r in data["calls"]], [service_row(s) for s in data["services"]]
    title = f"Single calls, one memory, K = {ROWS}, C = {CODE}"
    show_table(title, CALLS, calls, right=CALLS[1:3])
    show_table("The service", SERVICE, served, right=SERVICE[1:])
    page = [
        "# Serving",
        "\n".join(f"* {name}: {value}" for name, value in about.items()),
        f"## {title}",
        markdown_table(CALLS, calls),
        "## The service",
        markdown_table(SERVICE, served),
        "![serving.png](serving.png)",
    ]
    write_text(options.output / RESULTS[0], json.dumps(data, indent=1) + "\n")
    write_text(options.output / RESULTS[1], "\n\n".join(page) + "\n")
    with replace_file(options.output / RESULTS[2]) as file:
        draw(data["services"], about, options.seconds, file)
    print(f"Wrote {', '.join(str(options.output / name) for name in RESULTS)}")
    return 1 if any(row[-1] == "MISSED" for row in calls) else 0


def main(arguments: list[str] | None = None) -> int:
    return exit_status("serving", run, parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
