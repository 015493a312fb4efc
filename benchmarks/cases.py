"""A case at one setting: its inputs, every candidate that computes it, their verification, then their timing."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks.ceiling import DTYPES, flops, least_bytes
from benchmarks.forms import KEEPING, LOOP, compiled_forms, forms
from benchmarks.peers import PEERS, Unsuitable
from benchmarks.timing import LARGEST_GAP, time_until_quiet
from fastkm import MemoryState
from fastkm._runtime import dispatch
from fastkm.testing.definitions import Result
from fastkm.testing.episodes import Episode, build_episode
from fastkm.testing.gradients import symmetric
from fastkm.testing.images import load_images
from fastkm.testing.operations import OPERATIONS, Case, computation
from fastkm.testing.presets import Preset
from fastkm.testing.timing import clock
from fastkm.testing.verification import (
    OTHER_FORM,
    Verdict,
    compare,
    kernel_allowance,
    reference_errors,
    relative_errors,
)
from fastkm.writing.reference import write_gram_space

QUERIES, ITERS = 32, 10
NATIVE, REFERENCE = "native", "reference"
PYTORCH = ("loop", "eager", "compiled", "reference")  # kinds of candidates that are plain PyTorch
TWIN = ", again"  # what the name of a candidate's second timing ends in
DISTINCT_MEMORIES = 8  # a larger batch holds each of them several times
CHECKED_MEMORIES = 4  # of a batch, compared with float64
LONGEST_CALL = 2.5  # seconds; a slower call is left out
CALL_LIMIT = 600  # seconds after which a call is cut off that is not compiled
STATE = ("mean", "cov")
ESSENTIAL = {"update_posterior": STATE, "write": STATE, "read": ("values",)}  # a form may leave out the other fields


class Setting(NamedTuple):
    case: Case
    preset: Preset
    batch: int
    dtype: str = "float32"
    queries: int = QUERIES
    compile: bool = False
    synthetic: bool = False


class Candidate(NamedTuple):
    kind: str  # native, reference, loop, eager, compiled, peer, other job; the record of a twin says again
    make: Callable[[Episode], Callable[[Episode], Any]]


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


def episode(setting: Setting) -> Episode:
    distinct = min(setting.batch, DISTINCT_MEMORIES)
    make = synthetic_episode if setting.synthetic else real_episode
    e = make(setting.preset, distinct, setting.queries)
    which = torch.arange(setting.batch) % distinct
    return map_episode(lambda x: x.to(DTYPES[setting.dtype])[which], e)


# ---- verification --------------------------------------------------------------------------------------------------


def comparable(case: Case, kind: str, result: Any) -> Result:
    """The fields of a candidate's result by name; a function of the package is timed without taking them apart."""
    if kind in (NATIVE, REFERENCE):
        return computation(case).fields(result)
    return symmetric(result) if case.gradient else result


class Truth:
    """The definition in float64 for some memories of a batch, and the rounding that other computations make."""

    def __init__(self, case: Case, e: Episode) -> None:
        form, batch = computation(case), len(e.values)
        self.case = case
        self.memories = sorted({0, 1 % batch, batch // 2, batch - 1})[:CHECKED_MEMORIES]
        some = map_episode(lambda x: x[self.memories], e)
        self.fields = form.definition(some.to(torch.float64))
        self.independent = relative_errors(form.other(some), self.fields)
        self.reference = self.independent  # float64, where the reference may be the truth itself
        if e.values.dtype != torch.float64:
            self.reference = reference_errors(case, some, form.run(some, REFERENCE), self.fields)

    def verdict(self, kind: str, result: Any) -> Verdict:
        """Native kernels may have twice the reference's error, three times for a gradient; other forms 8 times."""
        result = {name: x[self.memories] for name, x in comparable(self.case, kind, result).items()}
        if kind == NATIVE:
            return compare(result, self.fields, self.reference, kernel_allowance(self.case))
        if kind == REFERENCE:
            return compare(result, self.fields, self.independent, OTHER_FORM)
        essential = tuple(self.fields) if self.case.gradient else ESSENTIAL.get(self.case.operation, tuple(self.fields))
        demanded = {name: x for name, x in self.fields.items() if name in result or name in essential}
        return compare(result, demanded, self.reference, OTHER_FORM)


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


def candidates(setting: Setting) -> dict[str, Candidate]:
    found = {name: Candidate(name, partial(bound_call, setting.case, name)) for name in (NATIVE, REFERENCE)}
    for name, form in forms(setting.case).items():
        found[name] = Candidate("loop" if name == LOOP else "eager", lambda _, form=form: form)
    found |= {name: Candidate("eager", make) for name, make in KEEPING.get(setting.case, {}).items()}
    if setting.compile:
        made = compiled_forms(setting.case)
        found |= {name: Candidate("compiled", lambda _, make=make: make()) for name, make in made.items()}
    for name, peer in PEERS.get(setting.case, {}).items():
        found[name] = Candidate("peer" if peer.same_job else "other job", peer.make)
    return found


def bound_call(case: Case, backend: str, e: Episode) -> Callable[[Episode], Any]:
    """The call of a backend with its arguments bound to ``e``, as a function that takes an episode like every form."""
    call = computation(case).bind(e, backend)
    return lambda _: call()


class Group:
    """All candidates of one setting: verified, then timed."""

    def __init__(
        self, setting: Setting, expected: dict[str, float], compile_limit: int, only: tuple[str, ...] | None = None
    ) -> None:
        """``expected``: seconds a call by candidate, known from a smaller batch. ``only``: names; None for all."""
        self.setting, self.compile_limit = setting, compile_limit
        self.ready: dict[str, Callable[[], object]] = {}  # what is to be timed
        self.records: dict[str, dict[str, Any]] = {}
        self.gaps: list[float] = []
        e, op = episode(setting), OPERATIONS[setting.case.operation]
        self.units, self.unit = op.units(e), op.unit
        truth = Truth(setting.case, e)
        torch._dynamo.reset()
        for name, candidate in candidates(setting).items():
            if only is not None and name not in only:
                continue
            reason = self.why_not(candidate.kind, expected.get(name, 0.0))
            found = {"status": "left out", "note": reason} if reason else self.verify(name, candidate, e, truth)
            self.records[name] = {"candidate": name, "kind": candidate.kind, **found}

    def verify(self, name: str, candidate: Candidate, e: Episode, truth: Truth) -> dict[str, Any]:
        """The record of a candidate; it is ready to be timed if its result is right."""
        begin = time.perf_counter()
        try:
            with at_most(self.compile_limit if candidate.kind == "compiled" else CALL_LIMIT):
                call = partial(candidate.make(e), e)
                result = call()
        except (TooSlow, Unsuitable) as why:
            return {"status": "left out", "note": str(why)}
        except Exception as error:  # any exception of a candidate is its result; the others are verified too
            return {"status": "failed", "note": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
        took = time.perf_counter() - begin
        found: dict[str, Any] = {"first_seconds": took, "status": "timed", "note": "computes something else"}
        if candidate.kind != "other job":
            verdict = truth.verdict(candidate.kind, result)
            found |= {"error": verdict.error, "allowed": verdict.allowed, "note": verdict.note}
            found["status"] = "timed" if verdict.ok else "failed"
        if took > LONGEST_CALL and found["status"] == "timed" and candidate.kind not in (NATIVE, "compiled"):
            found |= {"status": "left out", "note": f"verified, but a call takes {took:.1f} s"}
        if found["status"] == "timed":
            self.ready[name] = call
        return found

    def why_not(self, kind: str, expected: float) -> str | None:
        if kind in (NATIVE, REFERENCE):
            example = torch.empty(0, dtype=DTYPES[self.setting.dtype])
            if reason := dispatch.why_not(self.setting.case.operation, kind, example):
                return reason
        return f"a call would take about {expected:.0f} s" if expected > LONGEST_CALL else None

    def time(self, seconds: float) -> None:
        """Native and the fastest form in PyTorch are timed twice under two names, or whichever of the two is there."""
        pytorch = [name for name in self.ready if self.records[name]["kind"] in PYTORCH]
        quickest = min(pytorch, key=lambda name: clock(self.ready[name]), default=None)
        twins = {name: name + TWIN for name in (NATIVE, quickest) if name in self.ready}
        if not twins:
            return
        timings, self.gaps = time_until_quiet(
            self.ready | {twin: self.ready[name] for name, twin in twins.items()}, twins, seconds
        )
        for name, twin in twins.items():
            self.records[twin] = {**self.records[name], "candidate": twin, "kind": "again"}
        for name, timing in timings.items():
            self.records[name]["seconds"] = timing._asdict()

    def result(self) -> dict[str, Any]:
        s, void = self.setting, not self.gaps or min(self.gaps) > LARGEST_GAP
        about: dict[str, Any] = {**s.case._asdict(), "preset": s.preset._asdict(), "batch": s.batch}
        about |= {"dtype": s.dtype, "queries": s.queries, "iters": ITERS, "synthetic": s.synthetic}
        about |= {"flops": s.batch * flops(s.case, s.preset, s.queries)}
        about |= {"bytes": least_bytes(s.case, s.preset, s.batch, s.queries, s.dtype)}
        about |= {"units": self.units, "unit": self.unit, "gaps": self.gaps, "void": void}
        return {**about, "candidates": list(self.records.values())}
