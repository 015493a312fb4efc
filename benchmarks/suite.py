"""The full benchmark, in one command: `make bench-full`.

Every candidate is verified against float64, then all are timed in turn, beside the ceilings of the machine. Writes
results/full/suite.json, suite.md and pictures, and says of every speed the package promises whether it was met.
"""

import argparse
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import calls
import report
import torch
from baselines import LOOP, compiled_forms, forms
from ceiling import DTYPES, Ceiling, flops, least_bytes
from claims import NATIVE, PYTORCH, verdicts
from peers import PEERS, Unsuitable
from timing import LARGEST_GAP, interleave_until_quiet, keep_freed_memory, pin
from torch import Tensor
from torch.utils._pytree import tree_map

from fastkm import MemoryState
from fastkm._runtime import dispatch
from fastkm.cli.console import progress
from fastkm.cli.machine import machine
from fastkm.testing.episodes import Episode, build_episode
from fastkm.testing.gradients import ALL, GRADIENT, INPUTS, symmetric
from fastkm.testing.images import load_images
from fastkm.testing.measure import Verdict, clock, errors, granted, judge, reference_errors
from fastkm.testing.operations import Result, units
from fastkm.testing.presets import PRESETS, Preset
from fastkm.writing.reference import write_gram_space

FAMILIES = ("write", "update_posterior", "read", "solve_addressing", "kl_memory", "logdet")
QUERIES, ITERS, MANY_QUERIES = 32, 10, 100_000
REFERENCE, AGAIN = "reference", ", again"
LARGE = ("XL", "LLM")  # presets
DISTINCT = 8  # memories; a larger batch holds each of them several times
CHECKED = 4  # memories of a batch whose results are compared with float64
LONGEST = 2.5  # seconds of a call; what would take longer is left out
ENDLESS = 600  # seconds, for a call that is not compiled
FACTOR = 8  # times the reference's own error, granted to a form that rounds in another order
STATE = ("mean", "cov")
ESSENTIAL = {"update_posterior": STATE, "write": STATE, "read": ("values",)}  # a form may leave out the others


class Case(NamedTuple):
    operation: str
    preset: Preset
    batch: int
    dtype: str = "float32"
    queries: int = QUERIES
    compile: bool = False
    synthetic: bool = False


class Candidate(NamedTuple):
    kind: str  # native, reference, loop, eager, compiled, peer, other job; a twin is kept as again
    make: Callable[[Episode], Callable[[Episode], Result]]


# ---- inputs --------------------------------------------------------------------------------------------------------

images = cache(load_images)


def map_episode(function: Callable[[Tensor], Tensor], e: Episode) -> Episode:
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, e)


@cache
def real_episode(preset: Preset, distinct: int, queries: int) -> Episode:
    return build_episode(images(), preset, distinct, queries, ITERS)


def synthetic_episode(preset: Preset, batch: int, queries: int) -> Episode:
    """Gaussian codes, for shapes that images do not come in."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    _, K, C, T = preset
    prior, values = MemoryState(draw(K, C), torch.eye(K, dtype=torch.float64).repeat(batch, 1, 1)), draw(T, C)
    noise_var, ridge = values.new_ones(batch, T), values.new_ones(batch)
    mean, cov, weights, _, _ = write_gram_space(*prior, values, noise_var, ridge)
    written = MemoryState(mean, cov)
    return Episode(prior, values, weights, written, draw(queries, C), noise_var, ridge, ITERS, lambda x: x)


def episode(case: Case) -> Episode:
    distinct = min(case.batch, DISTINCT)
    make = synthetic_episode if case.synthetic else real_episode
    e = make(case.preset, distinct, case.queries)
    which = torch.arange(case.batch) % distinct
    return map_episode(lambda x: x.to(DTYPES[case.dtype])[which], e)


# ---- verification --------------------------------------------------------------------------------------------------


def fields(operation: str, kind: str, result: Any) -> Result:
    """What is compared of a candidate's result; a function of the package is timed without it."""
    if kind in (NATIVE, REFERENCE):
        return ALL[operation].fields(result)
    return symmetric(result) if operation.endswith(GRADIENT) else result


class Truth:
    """The definition in float64 for some memories of a batch, and the rounding that is granted."""

    def __init__(self, operation: str, e: Episode) -> None:
        op, batch = ALL[operation], len(e.values)
        self.operation = operation
        self.memories = sorted({0, 1 % batch, batch // 2, batch - 1})[:CHECKED]
        some = map_episode(lambda x: x[self.memories], e)
        self.fields = op.definition(some.to(torch.float64))
        self.independent = errors(op.other(some), self.fields)
        self.reference = self.independent  # float64, where the reference may be the truth itself
        if e.values.dtype != torch.float64:
            self.reference = reference_errors(operation, some, op.run(some, REFERENCE), self.fields)

    def judge(self, kind: str, result: Any) -> Verdict:
        """Native kernels are held to twice the reference's error, three times for a gradient."""
        result = {name: x[self.memories] for name, x in fields(self.operation, kind, result).items()}
        demanded = self.fields
        if kind not in (NATIVE, REFERENCE):
            essential = ESSENTIAL.get(self.operation, tuple(self.fields))
            demanded = {name: x for name, x in self.fields.items() if name in result or name in essential}
        if kind == NATIVE:
            return judge(result, demanded, self.reference, *granted(self.operation))
        return judge(result, demanded, self.independent if kind == REFERENCE else self.reference, FACTOR)


class TooSlow(Exception):
    """A compilation that did not end in time."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def interrupt(*_):
        raise TooSlow(f"not compiled within {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- one group -----------------------------------------------------------------------------------------------------


def candidates(case: Case) -> dict[str, Candidate]:
    op = ALL[case.operation]
    found = {name: Candidate(name, lambda _, name=name: partial(run_backend, op.call, name))
             for name in (NATIVE, REFERENCE)}  # fmt: skip
    for name, form in forms(case.operation).items():
        found[name] = Candidate("loop" if name == LOOP else "eager", lambda _, form=form: form)
    if case.compile:
        made = compiled_forms(case.operation)
        found |= {name: Candidate("compiled", lambda _, make=make: make()) for name, make in made.items()}
    for name, peer in PEERS.get(case.operation, {}).items():
        found[name] = Candidate("peer" if peer.same_job else "other job", peer.make)
    return found


def run_backend(call: Callable[[Episode, str], Any], backend: str, e: Episode) -> Any:
    return call(e, backend)


class Group:
    """Verified, then timed: all candidates of one case."""

    def __init__(
        self, case: Case, expected: dict[str, float], compile_limit: int, only: tuple[str, ...] | None = None
    ) -> None:
        """``expected``: seconds a call by candidate, where a smaller case tells. ``only``: names; all without it."""
        self.case, self.compile_limit = case, compile_limit
        self.ready: dict[str, Callable[[], object]] = {}  # what is to be timed
        self.records: dict[str, dict[str, Any]] = {}
        self.gaps: list[float] = []
        e = episode(case)
        self.units, self.unit = units(ALL[case.operation], e), ALL[case.operation].unit
        truth = Truth(case.operation, e)
        torch._dynamo.reset()
        for name, candidate in candidates(case).items():
            if only is not None and name not in only:
                continue
            reason = self.why_not(candidate.kind, expected.get(name, 0.0))
            found = {"status": "left out", "note": reason} if reason else self.verify(name, candidate, e, truth)
            self.records[name] = {"candidate": name, "kind": candidate.kind, **found}

    def verify(self, name: str, candidate: Candidate, e: Episode, truth: Truth) -> dict[str, Any]:
        """What became of a candidate; it is ready to be timed if its result is right."""
        begin = time.perf_counter()
        try:
            with at_most(self.compile_limit if candidate.kind == "compiled" else ENDLESS):
                call = partial(candidate.make(e), e)
                result = call()
        except (TooSlow, Unsuitable) as why:
            return {"status": "left out", "note": str(why)}
        except Exception as error:  # whatever a candidate raises is its result, and the others are still heard
            return {"status": "failed", "note": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
        took = time.perf_counter() - begin
        found: dict[str, Any] = {"first_seconds": took, "status": "timed", "note": "computes something else"}
        if candidate.kind != "other job":
            verdict = truth.judge(candidate.kind, result)
            found |= {"error": verdict.error, "allowed": verdict.allowed, "note": verdict.note}
            found["status"] = "timed" if verdict.ok else "failed"
        if took > LONGEST and found["status"] == "timed" and candidate.kind not in (NATIVE, "compiled"):
            found |= {"status": "left out", "note": f"verified, but a call takes {took:.1f} s"}
        if found["status"] == "timed":
            self.ready[name] = call
        return found

    def why_not(self, kind: str, expected: float) -> str | None:
        if kind in (NATIVE, REFERENCE):
            operation = self.case.operation.removesuffix(GRADIENT)
            if reason := dispatch.why_not(operation, kind, torch.empty(0, dtype=DTYPES[self.case.dtype])):
                return reason
        return f"a call would take about {expected:.0f} s" if expected > LONGEST else None

    def time(self, seconds: float) -> None:
        """Native and the fastest form in PyTorch are timed twice under two names, or whatever there is."""
        pytorch = [name for name in self.ready if self.records[name]["kind"] in PYTORCH]
        quickest = min(pytorch, key=lambda name: clock(self.ready[name]), default=None)
        twins = {name: name + AGAIN for name in (NATIVE, quickest) if name in self.ready}
        if not twins:
            return
        timings, self.gaps = interleave_until_quiet(
            self.ready | {twin: self.ready[name] for name, twin in twins.items()}, twins, seconds
        )
        for name, twin in twins.items():
            self.records[twin] = {**self.records[name], "candidate": twin, "kind": "again"}
        for name, timing in timings.items():
            self.records[name]["seconds"] = timing._asdict()

    def result(self) -> dict[str, Any]:
        case, void = self.case, not self.gaps or min(self.gaps) > LARGEST_GAP
        about = {"operation": case.operation, "preset": case.preset._asdict(), "batch": case.batch}
        about |= {"dtype": case.dtype, "queries": case.queries, "iters": ITERS, "synthetic": case.synthetic}
        about |= {"flops": case.batch * flops(case.operation, case.preset, case.queries)}
        about |= {"bytes": least_bytes(case.operation, case.preset, case.batch, case.queries, case.dtype)}
        about |= {"units": self.units, "unit": self.unit, "gaps": self.gaps, "void": void}
        return {**about, "candidates": list(self.records.values())}


# ---- the plan ------------------------------------------------------------------------------------------------------


def groups(options: argparse.Namespace) -> list[Case]:
    """Every family and preset; what takes minutes at the largest presets is left to a call that names it."""
    cases = []
    operations = list(options.families)
    if not options.forward:
        operations += [f + GRADIENT for f in options.families if f in INPUTS]
    for name in options.presets or PRESETS:
        for batch in options.batch or (1, 16, 256):
            if options.batch is None and batch > 16 and name in LARGE:
                continue
            for operation in operations:
                if options.presets is None and operation.endswith(GRADIENT) and (name in LARGE or batch > 16):
                    continue
                compile = options.compile and batch == 16
                cases.append(Case(operation, PRESETS[name], batch, compile=compile))
    if "float64" in options.dtypes:
        few = [c for c in cases if c.batch == 16 and c.preset.name in ("S", "M")] if options.batch is None else cases
        doubles = [case._replace(dtype="float64", compile=False) for case in few]
    else:
        doubles = []
    singles = list(cases) if "float32" in options.dtypes else []
    if "read" in options.families and "float32" in options.dtypes:
        singles += [Case("read", PRESETS[name], 1, queries=MANY_QUERIES)
                    for name in options.presets or ("S", "M", "L") if name not in LARGE]  # fmt: skip
    alone = Case("write", PRESETS["S"], 1)  # promised, so never left out
    if "write" in options.families and "float32" in options.dtypes and alone not in cases:
        singles.append(alone)
    return singles + doubles


SWEPT = ("write", "update_posterior", "read")
SWEEPS = {  # from preset S with B = 16, one letter at a time
    "B": (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "T": (16, 32, 64, 128, 256, 512, 1024),
    "K": (16, 32, 64, 128, 256),
    "C": (32, 64, 128, 256, 512, 1024),
}


def sweep_cases(options: argparse.Namespace) -> list[tuple[str, int, Case]]:
    cases = []
    for letter, sizes in SWEEPS.items():
        for size in sizes:
            batch = size if letter == "B" else 16
            preset = PRESETS["S"]._replace(name=f"{letter} = {size}", **({letter: size} if letter != "B" else {}))
            for operation in SWEPT:
                if operation in options.families and not (letter == "T" and operation == "read"):
                    cases.append((letter, size, Case(operation, preset, batch, synthetic=True)))
    return cases


# ---- the command ---------------------------------------------------------------------------------------------------


def measure_groups(options: argparse.Namespace, ceiling: Ceiling) -> list[dict[str, Any]]:
    cases, found, known = groups(options), [], {}
    with progress("bench-full", len(cases)) as start:
        for case in cases:
            key = case.operation, case.preset, case.dtype, case.queries
            start(f"{case.operation}, preset {case.preset.name}, B = {case.batch}, Q = {case.queries}, {case.dtype}")
            group = Group(case, {n: t * case.batch for n, t in known.get(key, {}).items()}, options.compile_limit)
            group.time(options.seconds)
            found.append(group.result())
            known[key] = {r["candidate"]: r["seconds"]["median"] / case.batch
                          for r in found[-1]["candidates"] if "seconds" in r}  # fmt: skip
            if time.monotonic() - ceiling.last > 60:
                ceiling.measure(1)
    return found


def measure_sweeps(options: argparse.Namespace) -> list[dict[str, Any]]:
    cases, found = sweep_cases(options), []
    with progress("against one size", len(cases), seconds=5) as start:
        for letter, size, case in cases:
            start(f"{case.operation}, {case.preset.name}")
            shown = (NATIVE, report.EAGER_OF_SWEEPS[case.operation])
            group = Group(case, {}, options.compile_limit, only=shown)
            group.time(options.seconds / 4)
            found.append({"letter": letter, "size": size, **group.result()})
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-full", description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, metavar="NAME", help="(default: all)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME",
                        help=f"of {', '.join(FAMILIES)} (default: all)")  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="memories (default: 1 16 256)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: both)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a group (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=("groups", "sweeps", "calls"), metavar="NAME",
                        default=("groups", "sweeps", "calls"), help="(default: groups sweeps calls)")  # fmt: skip
    parser.add_argument("--forward", action="store_true", help="no gradients")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile")
    parser.add_argument("--compile-limit", type=int, default=120, help="seconds a compilation may take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/full"), metavar="FOLDER")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options, begin = parse(arguments), time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")  # torch about itself
    pinned, ceiling = pin(options.threads), Ceiling()
    about = {**machine(), "pinned": pinned, "freed memory": keep_freed_memory()}
    about |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    print(*(f"{name:<18} {value}" for name, value in about.items()), sep="\n")
    ceiling.measure()
    print(f"{'ceilings':<18} {ceiling.told()}")
    data: dict[str, Any] = {"machine": about, "groups": [], "sweeps": [], "calls": {}}
    if "groups" in options.sections:
        data["groups"] = measure_groups(options, ceiling)
    if "sweeps" in options.sections:
        data["sweeps"] = measure_sweeps(options)
    if "calls" in options.sections:
        data["calls"] = calls.measure()
    ceiling.measure()
    about["minutes"] = round((time.perf_counter() - begin) / 60, 1)
    data["ceiling"] = {"product": ceiling.product, "bandwidth": ceiling.bandwidth, "history": ceiling.history}
    report.add_percentages(data)
    data["claims"] = [claim._asdict() for claim in verdicts(data)]
    report.write(data, ceiling.told(), options.output)
    failed = [r for g in data["groups"] for r in g["candidates"] if r["status"] == "failed" and r["kind"] == NATIVE]
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
