"""The full benchmark's own logic: what it compares computes the same thing, and a verdict needs a quiet group."""

import json
import shutil
import time

import pytest
import torch

from fastkm._runtime import schema
from fastkm.testing.operations import GRADIENT_CASES, KERNEL_OPERATIONS, Case, computation
from fastkm.testing.presets import PRESETS, Preset
from fastkm.testing.timing import LEAST_SAMPLES, MOST_SAMPLES, Timing, schedule
from fastkm.testing.verification import relative_errors

pytest.importorskip("benchmarks", reason="needs the source tree")

from benchmarks import cases, compare, compare_worker, filtering, suite, timing
from benchmarks.ceiling import flops, least_bytes
from benchmarks.claims import ABSENT, MET, MISSED, VOID, best_pytorch, slope, verdicts
from benchmarks.compare import summarise
from benchmarks.kernels import __main__ as kernels
from benchmarks.peers import Unsuitable

SMALL = Preset("small", 7, 12, 9)
CASES = (*map(Case, KERNEL_OPERATIONS), *GRADIENT_CASES)


def setting(case, **options):
    return cases.Setting(case, SMALL, 3, "float64", queries=5, synthetic=True, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form_and_peer_computes_the_same(case):
    """In float64, to a thousand roundings: the forms are algebra, not approximations."""
    e = cases.episode(setting(case))
    truth = computation(case).definition(e)
    essential = truth if case.gradient else cases.ESSENTIAL.get(case.operation, truth)
    seen = 0
    for name, candidate in cases.candidates(setting(case)).items():
        if candidate.kind in ("native", "other job"):
            continue
        try:
            result = cases.comparable(case, candidate.kind, candidate.make(e)(e))
        except Unsuitable:
            continue
        assert set(result) <= set(truth), name
        assert set(result) >= set(essential), name
        for field, error in relative_errors(result, {field: truth[field] for field in result}).items():
            assert error < 1e4 * torch.finfo(torch.float64).eps, (name, field)
        seen += 1
    assert seen >= 2


def test_no_form_changes_its_inputs():
    for case in CASES:
        e = cases.episode(setting(case))
        before = cases.map_episode(torch.clone, e)
        for form in cases.forms(case).values():
            form(e)
        for field in ("prior", "written"):
            assert all(torch.equal(x, y) for x, y in zip(getattr(e, field), getattr(before, field), strict=True))
        for field in ("values", "weights", "queries", "noise_var", "ridge"):
            assert torch.equal(getattr(e, field), getattr(before, field)), (case, field)


def test_a_wrong_candidate_is_not_timed(monkeypatch):
    right = cases.forms(Case("write"))["literal loop"]

    def wrong(e):
        result = right(e)
        return {**result, "mean": result["mean"] + 1e-6}

    def broken(e):
        raise RuntimeError("no")

    monkeypatch.setattr(cases, "forms", lambda case: {"right": right, "wrong": wrong, "broken": broken})
    group = cases.Group(setting(Case("write")), {}, 1)
    status = {name: record["status"] for name, record in group.records.items()}
    assert (status["right"], status["wrong"], status["broken"]) == ("timed", "failed", "failed")
    assert not {"wrong", "broken"} & set(group.ready)
    group.time(0.0)
    assert "seconds" in group.records["right"]
    assert "seconds" not in group.records["wrong"]
    assert group.result()["flops"] > 0


def test_what_would_take_too_long_is_left_out():
    group = cases.Group(setting(Case("logdet")), {"closed form": 100.0}, 1)
    assert group.records["closed form"]["status"] == "left out"
    assert "closed form" not in group.ready


def test_a_compilation_is_cut_off():
    with pytest.raises(cases.TooSlow), cases.at_most(1):
        time.sleep(5)


# ---- ratios, slopes, verdicts --------------------------------------------------------------------------------------


def timed(name, kind, median, status="timed"):
    return {"candidate": name, "kind": kind, "status": status,
            "seconds": Timing(median, median, median, 3, 1)._asdict()}  # fmt: skip


def group(operation="write", preset="S", batch=16, queries=32, void=False, **medians):
    native, others = medians.pop("native", 1.0), medians.pop("others", ())
    return {"operation": operation, "gradient": False, "preset": PRESETS[preset]._asdict(), "batch": batch,
            "dtype": "float32", "queries": queries, "void": void,
            "candidates": [timed("native", "native", native), *others]}  # fmt: skip


def claims_of(*groups, sweeps=(), calls=None):
    return verdicts({"groups": list(groups), "sweeps": list(sweeps), "calls": calls or {}})


def test_best_of_pytorch_is_the_fastest_that_passed_and_does_the_job():
    found = group(others=(
        timed("slow", "eager", 9.0), timed("quick", "compiled", 7.0), timed("wrong", "eager", 1.0, "failed"),
        timed("softmax", "other job", 2.0), timed("peer", "peer", 3.0), timed("quick, again", "again", 6.0),
    ))  # fmt: skip
    assert best_pytorch(found)["candidate"] == "quick"


def test_a_claim_is_met_missed_void_or_not_measured():
    others = (timed("literal loop", "loop", 20.0), timed("Gram space", "eager", 5.0))
    first, second, *_, single = [c for c in claims_of(group(others=others)) if c.number == 1]
    assert (first.verdict, second.verdict, single.verdict) == (MET, MISSED, ABSENT)
    assert first.measured.startswith("20.00 × literal loop")
    assert second.measured.startswith("5.00 × Gram space")
    void = [c for c in claims_of(group(others=others, void=True)) if c.number == 1]
    assert {c.verdict for c in void} == {VOID, ABSENT}


def test_no_verdict_without_a_native_timing():
    found = group(others=(timed("literal loop", "loop", 20.0),))
    found["candidates"][0]["status"] = "failed"
    assert {c.verdict for c in claims_of(found)} == {ABSENT}


@pytest.mark.parametrize("power", [0.5, 1.0, 1.3])
def test_slope_is_the_exponent(power):
    sizes = [2, 8, 32, 64]
    assert slope(sizes, [3e-5 * size**power for size in sizes]) == pytest.approx(power)


def test_slopes_leave_out_void_sizes():
    def sweep(void_from):
        sizes = (2, 4, 8, 16, 32, 64, 128)
        groups = [group(native=1e-5 * n if i < void_from else 1.0, void=i >= void_from) for i, n in enumerate(sizes)]
        return [{**g, "letter": "B", "size": size} for g, size in zip(groups, sizes, strict=True)]

    def verdict(points):
        return next(c for c in claims_of(sweeps=points) if c.what == "write: cost over B").verdict

    assert verdict(sweep(void_from=5)) == MET
    assert verdict(sweep(void_from=4)) == VOID


def test_a_group_is_repeated_until_quiet_and_then_given_up(monkeypatch):
    def attempts(*gaps):
        left = iter(gaps)
        monkeypatch.setattr(timing, "time_in_turn", lambda *_: {"a": Timing(1.0, 1, 1, 3, 1),
                                                              "b": Timing(1 + next(left), 1, 1, 3, 1)})  # fmt: skip
        timings, found = timing.time_until_quiet({}, {"a": "b"}, 0.0)
        return timings["b"].median - 1, found

    kept, found = attempts(0.3, 0.04)
    assert kept == pytest.approx(0.04)
    assert found == pytest.approx([0.3, 0.04])
    kept, found = attempts(0.3, 0.1, 0.2)
    assert kept == pytest.approx(0.1)
    assert min(found) > timing.LARGEST_GAP


def test_candidates_take_turns():
    costs = {"quick": 1e-3, "again": 1e-3, "slow": 0.1}
    order = schedule(costs, dict.fromkeys(costs, LEAST_SAMPLES), seconds=0.6)
    assert order.count("quick") == order.count("again") == MOST_SAMPLES
    assert order.count("slow") == LEAST_SAMPLES
    spots = [i for i, name in enumerate(order) if name == "slow"]
    assert max(b - a for a, b in zip([0, *spots], [*spots, len(order)], strict=True)) <= len(order) // 2
    assert len({tuple(order[i : i + 2]) for i in range(0, 20, 2)}) > 1  # not always in one order


def test_flops_of_an_update_are_those_of_its_block_form():
    _, K, C, T = SMALL
    exact = 2 * T * K * K + T * T * K + T**3 / 3 + T * T * K + 2 * T * K * C + T * T * C + 2 * T * K * C + T * K * K
    assert flops(Case("update_posterior"), SMALL, 5) == pytest.approx(exact, rel=0.1)  # a triangle has its diagonal
    assert flops(Case("update_posterior", True), SMALL, 5) > 2 * exact
    single, double = (least_bytes(Case("write"), SMALL, 3, 5, dtype) for dtype in ("float32", "float64"))
    assert double == 2 * single


def test_a_comparison_with_itself():
    taken = summarise([{"base": 2.0 * x, "this": x, "again": 1.01 * x} for x in (1.0, 1.5, 9.0)])
    assert taken["ratio"] == pytest.approx(2.0)  # turn by turn, so the drift is not in it
    assert not taken["void"]
    assert summarise([{"base": 2.0, "this": 1.0, "again": 1.2}] * 3)["void"]


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_worker_of_a_comparison_makes_the_calls_of_the_registry(case):
    """Its table is a copy, because it also runs in revisions without a registry."""
    e = cases.episode(setting(case))
    form = computation(case)
    ours = form.fields(form.bind(e, "native")())
    theirs = compare_worker.run(*case, e._asdict())
    assert len(ours) == len(theirs)
    for x, y in zip(ours.values(), theirs, strict=True):
        assert torch.equal(x, (y + y.mT) / 2 if case.gradient and y.shape[-2:] == (SMALL.K, SMALL.K) else y)


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_a_worker_times_what_it_is_asked_for(tmp_path):
    e = cases.episode(setting(Case("write")))._asdict()
    del e["clean"]
    torch.save({name: tuple(x) if isinstance(x, tuple) else x for name, x in e.items()}, tmp_path / "inputs.pt")
    worker = compare.Worker(compare.ROOT, 1)
    try:
        assert worker.ask("load", tmp_path / "inputs.pt") == "loaded"
        assert worker.ask("run", "write", "gradient", tmp_path / "result.pt") == "saved"
        assert len(torch.load(tmp_path / "result.pt")) == 5
        assert worker.clock("time", "write", "gradient")(2) > 0
        assert worker.clock("call", "write", "floats")(2) > 0
    finally:
        worker.close()
    assert worker.process.returncode == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_every_single_kernel_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "BUILT", tmp_path)
    library = kernels.build_library(compare.ROOT, "test", "base", ["-O0"])
    for kernel in kernels.KERNELS:
        assert kernels.clock(library, kernel, SMALL, 2)(1) > 0, kernel
    assert kernels.clock(library, "no kernel", SMALL, 2)(1) < 0


class Assumed:
    """Ceilings that nobody measured: a test does not depend on time."""

    product, bandwidth, history, last = {"float32": 1e11, "float64": 5e10}, 1e10, (), float("inf")

    def measure(self, repeats=1):
        pass

    def describe(self):
        return "assumed"


def test_a_run_writes_everything(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="in the bench extra")
    settings = [setting(Case("write")), setting(Case("logdet"))._replace(dtype="float32")]
    monkeypatch.setattr(suite, "groups", lambda options: settings)
    monkeypatch.setattr(suite, "pin", lambda threads: "not pinned: a test")
    monkeypatch.setattr(suite, "keep_freed_memory", lambda: "not kept: a test")
    monkeypatch.setattr(suite, "Ceiling", Assumed)
    arguments = ["--sections", "groups", "--seconds", "0", "--output", str(tmp_path)]
    assert suite.main(arguments) == 0
    data = json.loads((tmp_path / "suite.json").read_text())
    assert len(data["groups"]) == 2
    assert data["claims"]
    page, out = (tmp_path / "suite.md").read_text(), capsys.readouterr().out
    assert "## Must show" in page
    assert "Must show" in out
    assert "literal loop" in page


# The filter beside attention and the delta rule.


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_every_exact_form_of_the_filter_has_its_values_and_gradients():
    inputs = filtering.draw(2, 150, 8)
    filtering.verify(filtering.CANDIDATES, inputs)
    expected = filtering.with_gradient(filtering.native)(inputs)
    for name in ("step loop", "block form"):
        for x, y in zip(filtering.with_gradient(filtering.CANDIDATES[name])(inputs), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_a_wrong_form_of_the_filter_is_noticed():
    wrong = {"block form": lambda k, v, q: [x + 1e-3 for x in filtering.block_form(k, v, q)]}
    with pytest.raises(AssertionError, match="not close"):
        filtering.verify(wrong, filtering.draw(2, 150, 8))
