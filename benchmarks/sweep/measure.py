"""One cell: its inputs, the forms that compute it, their check, and their time."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch._dynamo.config
import torch.fx.experimental._config
from torch import Tensor

from benchmarks.cases import CALL_LIMIT, ESSENTIAL, NATIVE, TWIN, TooSlow, at_most, comparable, map_episode
from benchmarks.forms import DUAL, FORMS, Form, compiled_forms
from benchmarks.sweep.grid import OPERATIONS, TINY, Cell
from benchmarks.sweep.journal import Record
from benchmarks.timing import time_until_quiet
from fastkm import MemoryState
from fastkm.testing.episodes import Episode
from fastkm.testing.operations import Case, computation
from fastkm.testing.timing import SLOW, clock, no_collection
from fastkm.testing.verification import relative_errors

Call = Callable[[], Any]
ITERS = 1  # of a read: the function's own default, and what a query costs where reads are served
DISTINCT = 4  # memories; a larger batch holds each of them several times
TRUE_FORM = {"update_posterior": "block form", "write": "Gram space, Woodbury", "read": "K-space, factored once"}
EXACT_FLOPS = 4e9  # of the memories that are checked; above, what they are compared with is float32
KERNEL_ROUNDINGS, FORM_ROUNDINGS = 16, 128

CHEAP = 0.05  # seconds; a form that takes less is called in every cell
SLOWER = 3.0  # times the fastest form in PyTorch; a form above is not timed
COSTLY, NEAR = 1.0, 1.3  # seconds; where the best form takes more, only forms this near to it are called
CLOSE = 1.5  # times the fastest; forms below are timed with it
MOST_TIMED = 3  # forms in PyTorch
COMPILED_ROWS = 256  # compiled forms are called up to here, and for single patterns: beyond, the products are all
LEFT_OUT = ("compiled block form", "compiled K-space")  # never faster than the other compiled form; compiling costs
LONG = 0.3  # seconds of all that is timed once each: more, and each is called three times at most
LONGEST = 8.0  # more than this, and the first calls are the times
ALWAYS = {TINY: ("block form",)}  # timed however slow, because something is promised
UNKNOWN = 60  # seconds that a form may take where nothing is known


# ---- inputs --------------------------------------------------------------------------------------------------------


def make_inputs(cell: Cell) -> Episode:
    """Gaussian codes and rows of length about 1, so that with λ = σ² = 1 no form loses digits, whatever the shape."""
    generator, distinct = torch.Generator().manual_seed(0), min(cell.batch, DISTINCT)

    def draw(*shape: int) -> Tensor:
        return torch.randn(distinct, *shape, generator=generator) / math.sqrt(shape[-1])

    patterns, queries = cell.preset.T, cell.queries
    spread = draw(4, cell.K)
    prior = MemoryState(draw(cell.K, cell.C), torch.eye(cell.K) + spread.mT @ spread)
    noise_var, ridge = torch.ones(distinct, patterns), torch.ones(distinct)
    values, weights, cues = draw(patterns, cell.C), draw(patterns, cell.K), draw(queries, cell.C)
    e = Episode(prior, values, weights, prior, cues, noise_var, ridge, ITERS, lambda x: x)
    which = torch.arange(cell.batch) % distinct
    return map_episode(lambda x: x[which], e)


# ---- the check -----------------------------------------------------------------------------------------------------


class Truth:
    """What the first and the last memory of a batch must give: a form in PyTorch, in float64 where that is cheap.

    The matrices that are solved with have condition numbers below 8. Rounding then adds up like a random walk over the
    K + C + T terms of a sum: a kernel may be wrong by ``16 eps sqrt(K + C + T)`` of a field's largest entry, and a form
    by 8 times as much, because another algorithm has another constant. Where the truth is in float32 it rounds as well,
    as a form does.
    """

    def __init__(self, cell: Cell, e: Episode) -> None:
        self.case, self.memories = cell.case, sorted({0, cell.batch - 1})
        some = map_episode(lambda x: x[self.memories], e)
        self.exact = cell.flops / cell.batch * len(self.memories) <= EXACT_FLOPS
        fields = FORMS[cell.case][TRUE_FORM[cell.operation]](some.to(torch.float64) if self.exact else some)
        essential = (*ESSENTIAL[cell.operation], "weights")
        self.fields = fields if self.exact else {name: x for name, x in fields.items() if name in essential}
        self.rounding = torch.finfo(torch.float32).eps * math.sqrt(cell.K + cell.C + cell.count)

    def allowed(self, kind: str) -> float:
        roundings = KERNEL_ROUNDINGS if kind == NATIVE else FORM_ROUNDINGS
        return self.rounding * (roundings if self.exact else roundings + FORM_ROUNDINGS)

    def error(self, kind: str, result: Any) -> float:
        """In the worst field; infinite where an essential one is absent. A form may leave out the others."""
        found = {name: x[self.memories] for name, x in comparable(self.case, kind, result).items()}
        absent = set(self.fields if kind == NATIVE else ESSENTIAL[self.case.operation]) - set(found)
        wanted = {name: x for name, x in self.fields.items() if name in found}
        if absent or any(found[name].shape != x.shape for name, x in wanted.items()):
            return math.inf
        errors = relative_errors(found, wanted).values()
        return math.inf if any(math.isnan(error) for error in errors) else max(errors)


# ---- forms ----------------------------------------------------------------------------------------------------------


@contextmanager
def few_compilations() -> Iterator[None]:
    """One compilation for all sizes above 1, equal or not.

    A form that is compiled too often fails; PyTorch's own default is to run it uncompiled without a word.
    """
    dynamo = torch._dynamo.config.patch(recompile_limit=32, fail_on_recompile_limit_hit=True)
    with dynamo, torch.fx.experimental._config.patch(use_duck_shape=False):
        yield


# ---- one cell ------------------------------------------------------------------------------------------------------


class Sweep:
    """Measures cells one after the other, and remembers which forms are slow."""

    def __init__(self, seconds: float, compile: bool, compile_limit: int) -> None:
        self.seconds, self.compile_limit = seconds, compile_limit
        self.compiled: dict[str, dict[str, Form]] = {}
        for operation in OPERATIONS if compile else ():
            made = compiled_forms(Case(operation), dynamic=True)
            self.compiled[operation] = {name: make() for name, make in made.items() if name not in LEFT_OUT}
        # (operation, count, batch) -> the last cell's flops, and the seconds of every form that was called
        self.known: dict[tuple[str, int, int], tuple[int, dict[str, float]]] = {}

    def remember(self, record: Record) -> None:
        cell = Cell(*record["cell"])
        key, forms = (cell.operation, cell.count, cell.batch), record.get("forms", {})
        before, flops = self.known.get(key, (cell.flops, {})), cell.flops
        scaled = {name: seconds * flops / before[0] for name, seconds in before[1].items()}
        called = {name: form["seconds"] for name, form in forms.items() if "seconds" in form}
        self.known[key] = flops, scaled | called

    def forms(self, cell: Cell) -> dict[str, Form]:
        """All that are worth a call, the fastest first as far as smaller cells tell."""
        found = dict(FORMS[cell.case])
        found |= DUAL.get(cell.case, {}) if cell.C < cell.K else {}
        found |= self.compiled.get(cell.operation, {}) if cell.K <= COMPILED_ROWS or cell.count == 1 else {}
        flops, known = self.known.get((cell.operation, cell.count, cell.batch), (cell.flops, {}))
        expected = {name: known[name] * cell.flops / flops for name in found if name in known}
        best = min(expected.values(), default=math.inf)
        most = max(CHEAP, best * (NEAR if COSTLY < best < math.inf else SLOWER))
        names = [name for name in found if expected.get(name, 0.0) <= most]
        return {name: found[name] for name in sorted(names, key=lambda name: expected.get(name, math.inf))}

    def measure(self, cell: Cell) -> Record:
        begin = time.perf_counter()
        e = make_inputs(cell)
        truth, call = Truth(cell, e), computation(cell.case).bind(e, None)
        record: Record = {"cell": list(cell), "flops": cell.flops, "bytes": cell.bytes, "exact": truth.exact}
        own = try_call(call, truth, NATIVE, CALL_LIMIT)
        record |= {**own, "forms": {}}
        if own["status"] == "right":
            calls = {name: partial(form, e) for name, form in self.forms(cell).items()}
            for name in calls:
                record["forms"][name] = self.try_form(cell, name, calls[name], truth, record["forms"])
            record |= self.compare({NATIVE: call, **calls}, own["seconds"], record["forms"], ALWAYS.get(cell, ()))
        record["spent"] = time.perf_counter() - begin
        self.remember(record)
        return record

    def try_form(self, cell: Cell, name: str, call: Call, truth: Truth, others: Mapping[str, Record]) -> Record:
        compiled = self.compiled.get(cell.operation, {})
        if name in compiled:
            found = try_call(call, truth, "compiled", self.compile_limit)
            if found["status"] in ("slow", "failed"):
                del compiled[name]  # it would be compiled again in vain
            return found
        best = min((form["seconds"] for form in others.values() if form["status"] == "right"), default=None)
        return try_call(call, truth, "eager", UNKNOWN if best is None else 1 + math.ceil(SLOWER * best))

    def compare(
        self, calls: Mapping[str, Call], own: float, forms: Mapping[str, Record], always: tuple[str, ...]
    ) -> Record:
        """The times of the kernel and of the fastest forms, in turns; updates the seconds of these."""
        right = {name: form["seconds"] for name, form in forms.items() if form["status"] == "right"}
        if not right:
            return {"note": "no form in PyTorch is right"}
        quickest = min(right, key=right.__getitem__)
        timed = [name for name in sorted(right, key=right.__getitem__) if right[name] <= CLOSE * right[quickest]]
        timed = timed[:MOST_TIMED]
        timed += [name for name in always if name in right and name not in timed]
        costs = {NATIVE: own, **{name: right[name] for name in timed}}
        seconds, gap = self.time({name: calls[name] for name in costs}, costs, quickest)
        for name in timed:
            forms[name]["seconds"] = seconds[name]
        best = min(timed, key=seconds.__getitem__)
        found = {"seconds": seconds[NATIVE], "best": best, "best_seconds": seconds[best], "gap": gap}
        return {**found, "ratio": seconds[best] / seconds[NATIVE]}

    def time(
        self, calls: Mapping[str, Call], costs: Mapping[str, float], quickest: str
    ) -> tuple[dict[str, float], float | None]:
        """Seconds a call, and how much two timings of one thing differ; None where there is one timing."""
        total = sum(costs.values()) + costs[NATIVE]
        if total <= LONG:
            twins = {name: name + TWIN for name in (NATIVE, quickest)}
            timings, gaps = time_until_quiet(
                {**calls, **{twin: calls[name] for name, twin in twins.items()}}, twins, self.seconds
            )
            return {name: timings[name].median for name in calls}, min(gaps)
        if total > LONGEST:
            return dict(costs), None
        names = [*calls, NATIVE]
        samples: dict[str, list[float]] = {name: [] for name in calls}
        with no_collection():
            for _ in range(max(1, min(3, int(4 * LONG / total)))):
                for name in names:
                    samples[name].append(clock(calls[name]))
        own = samples[NATIVE]
        return {name: statistics.median(taken) for name, taken in samples.items()}, max(own) / min(own) - 1


def try_call(call: Call, truth: Truth, kind: str, limit: int) -> Record:
    """Call once to check the result, and once more for the time if that is short; an alarm ends what is slow."""
    try:
        with at_most(limit):
            begin = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - begin
    except TooSlow:
        return {"status": "slow", "note": f"did not end within {limit} s", "seconds": float(limit)}
    except Exception as error:  # any exception of a form is its result; the others are called too
        return {"status": "failed", "note": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
    error = truth.error(kind, result)
    del result
    if seconds < SLOW or kind == "compiled":
        seconds = min(seconds, clock(call))
    allowed = truth.allowed(kind)
    return {"status": "right" if error <= allowed else "wrong", "error": error, "allowed": allowed, "seconds": seconds}
