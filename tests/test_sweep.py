"""The sweep's own logic: which cells, which forms, what is right, what is kept, and what is said about it."""

import json
import math
import time

import pytest
import torch

from fastkm._runtime import schema

pytest.importorskip("benchmarks", reason="needs the source tree")

from benchmarks import forms
from benchmarks.cases import NATIVE, Setting, synthetic_episode
from benchmarks.sweep import __main__ as command
from benchmarks.sweep import measure, one_memory, picture, report
from benchmarks.sweep.grid import MOST_BYTES, OPERATIONS, ROWS, TINY, Cell, all_cells, select
from benchmarks.sweep.journal import Journal
from fastkm.testing.operations import Case, computation
from fastkm.testing.presets import Preset
from fastkm.testing.verification import relative_errors

NATIVE_MISSING = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
CEILING = {"product": 1e11, "bandwidth": 1e10}
SMALL = Cell("write", 8, 4, 16, 16)


def record(cell, ratio=2.0, gap=0.01, seconds=1e-3, **more):
    return {"cell": list(cell), "status": "right", "flops": 10**7, "bytes": 10**6, "seconds": seconds, "ratio": ratio,
            "gap": gap, "best": "a form", "best_seconds": ratio * seconds, "error": 1e-7, "allowed": 1e-6,
            "forms": {"block form": {"status": "right", "seconds": 9 * seconds}}, **more}  # fmt: skip


# ---- the grid ------------------------------------------------------------------------------------------------------


def test_the_grid_has_every_shape_that_fits():
    cells = all_cells()
    assert len(set(cells)) == len(cells)
    assert {cell.operation for cell in cells} == set(OPERATIONS)
    assert all(cell.C <= 2048 and cell.bytes <= MOST_BYTES for cell in cells)
    assert all(cell.K in (cell.C // 2, cell.C, 2 * cell.C) for cell in cells)
    single = [(cell.K, cell.C) for cell in cells if cell[0] == "write" and cell.batch == cell.count == 1]
    assert len(single) == 3 * 9 + 2 + 1  # up to K = 1024 three codes, then those up to 2,048
    assert {K for K, _ in single} == set(ROWS)
    assert Cell("update_posterior", 4096, 2048, 256, 16) not in cells  # 3 GiB
    assert TINY in cells


def test_cells_are_chosen_by_every_letter():
    cells = all_cells()
    assert select(cells) == cells
    chosen = select(cells, ["read"], [64], [32, 64], [1], [16])
    assert chosen == [Cell("read", 64, 32, 1, 16), Cell("read", 64, 64, 1, 16)]
    assert select(cells, rows=[5]) == []


def test_bytes_and_flops_of_a_cell_grow_with_the_batch():
    one, many = Cell("read", 64, 32, 16, 1), Cell("read", 64, 32, 16, 16)
    assert (many.bytes, many.flops) == (16 * one.bytes, 16 * one.flops)
    K, C, Q = 64, 32, 16
    assert one.bytes == 4 * (K * C + Q * C + 1 + Q * C + Q * K + 1)  # mean, queries, ridge; values, weights, info


# ---- forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["write", "read"])
def test_dual_forms_compute_the_same(operation):
    case = Case(operation)
    e = synthetic_episode(Setting(case, Preset("small", 12, 5, 6), 3).preset, 3, 4)
    truth = computation(case).definition(e)
    for form in forms.DUAL[case].values():
        result = form(e)
        assert {"mean", "cov"} <= set(result) or "values" in result
        errors = relative_errors(result, {name: truth[name] for name in result})
        assert max(errors.values()) < 1e4 * torch.finfo(torch.float64).eps


def test_dual_forms_are_called_where_a_code_is_shorter_than_the_memory():
    sweep = measure.Sweep(0.0, False, 1)
    assert "C-space, factored once" in sweep.forms(Cell("read", 64, 32, 1, 1))
    assert "C-space, factored once" not in sweep.forms(Cell("read", 64, 64, 1, 1))


def test_a_form_that_was_slow_is_left_out_where_it_would_cost():
    sweep, cell = measure.Sweep(0.0, False, 1), Cell("read", 64, 64, 1, 1)
    slow, larger = "K-space, eigenvalues", Cell("read", 2048, 2048, 1, 1)
    seconds = {name: 1e-3 for name in sweep.forms(cell)} | {slow: 4e-3}
    sweep.remember({"cell": list(cell), "forms": {name: {"seconds": x} for name, x in seconds.items()}})
    assert slow in sweep.forms(Cell("read", 128, 128, 1, 1))  # milliseconds: every form is called
    assert slow not in sweep.forms(larger)
    assert "K-space, inverse" in sweep.forms(larger)
    assert slow in sweep.forms(larger._replace(batch=16))  # nothing is known there


def test_a_form_that_was_cut_off_is_known_to_be_slow():
    def endless():
        time.sleep(5)

    cell = Cell("read", 2048, 2048, 1, 1)
    found = measure.try_call(endless, None, "eager", 1)
    assert (found["status"], found["seconds"]) == ("slow", 1.0)
    sweep = measure.Sweep(0.0, False, 1)
    others = {name: {"seconds": 0.1} for name in sweep.forms(cell) if name != "literal loop"}
    sweep.remember({"cell": list(cell), "forms": {**others, "literal loop": found}})
    assert "literal loop" not in sweep.forms(cell)


def test_a_form_that_does_not_compile_is_compiled_once():
    sweep, cell = measure.Sweep(0.0, False, 60), Cell("read", 4, 4, 1, 1)

    def broken():
        raise RuntimeError("no")

    sweep.compiled["read"] = {"compiled": broken}
    found = sweep.try_form(cell, "compiled", broken, None, {})
    assert (found["status"], found["note"]) == ("failed", "RuntimeError: no")
    assert "compiled" not in sweep.forms(cell)


# ---- the check -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [Cell(name, 8, 4, 16, 16) for name in OPERATIONS], ids=str)
def test_a_result_is_right_by_a_theorem_and_wrong_by_a_small_error(cell):
    e = measure.make_inputs(cell)
    truth, form = measure.Truth(cell, e), computation(cell.case)
    result = form.bind(e, "reference")()
    assert truth.exact
    assert truth.error(NATIVE, result) <= truth.allowed(NATIVE)
    fields = form.fields(result)
    name = "values" if cell.operation == "read" else "mean"
    nudged = {**fields, name: fields[name] + 1e-2}
    assert truth.error("eager", nudged) > truth.allowed("eager")
    assert truth.error("eager", {**fields, name: fields[name] * math.nan}) == math.inf
    assert truth.error("eager", {k: x for k, x in fields.items() if k != name}) == math.inf


def test_a_batch_holds_different_memories():
    mean = measure.make_inputs(Cell("read", 4, 4, 1, 16)).prior.mean
    assert not torch.equal(mean[0], mean[1])
    assert torch.equal(mean[0], mean[measure.DISTINCT])


@NATIVE_MISSING
def test_a_wrong_kernel_gets_no_ratio(monkeypatch):
    monkeypatch.setattr(measure.Truth, "error", lambda self, kind, result: 1.0)
    found = measure.Sweep(0.0, False, 1).measure(SMALL)
    assert found["status"] == "wrong"
    assert "ratio" not in found
    assert not found["forms"]
    assert "the kernel is wrong" in " ".join(report.facts([found], CEILING))


@NATIVE_MISSING
def test_a_wrong_form_is_not_the_best(monkeypatch):
    case = SMALL.case
    quick = {"quick and wrong": lambda e: {"mean": e.prior.mean, "cov": e.prior.cov}}
    monkeypatch.setitem(measure.FORMS, case, {**measure.FORMS[case], **quick})
    found = measure.Sweep(0.0, False, 1).measure(SMALL)
    assert found["forms"]["quick and wrong"]["status"] == "wrong"
    assert found["best"] != "quick and wrong"
    assert found["ratio"] == pytest.approx(found["best_seconds"] / found["seconds"])


# ---- the journal ---------------------------------------------------------------------------------------------------


def test_a_record_counts_for_the_code_and_machine_that_made_it(tmp_path):
    path = tmp_path / "cells.jsonl"
    journal = Journal(path, "code", "machine")
    assert journal.read() == {}
    journal.note(record(SMALL, 2.0))
    journal.note(record(SMALL, 3.0))
    with path.open("a", encoding="utf-8") as file:
        file.write('\n{"cell": ["wri')  # a process that was killed
    journal.note(record(TINY))
    assert {cell: r["ratio"] for cell, r in journal.read().items()} == {SMALL: 3.0, TINY: 2.0}
    assert Journal(path, "other code", "machine").read() == {}
    assert Journal(path, "code", "other machine").read() == {}


# ---- what is said --------------------------------------------------------------------------------------------------


def test_cells_below_one_are_told_with_their_noise():
    cells = [Cell("read", K, K, 1, 1) for K in (4, 8, 16, 32)]
    ratios, gaps = (0.5, 0.97, 1.2, 4.0), (0.02, 0.05, 0.3, 0.0)
    records = [record(cell, ratio, gap) for cell, ratio, gap in zip(cells, ratios, gaps, strict=True)]
    assert [r["ratio"] for r in report.below_one(records)] == [0.5, 0.97]
    assert [report.beyond_noise(r) for r in records] == [True, False, False, False]
    assert report.beyond_noise(record(cells[0], 0.9, None))
    assert not report.beyond_noise(record(cells[0], 0.96, None))  # one timing: what is tolerated
    told = " ".join(report.facts(records, CEILING))
    assert "2 cells below 1.0, 1 of them by more than" in told
    assert "read: 4 cells, ratio 0.50 to 4.0, median 1.08" in told
    assert "In 1 cells two timings of one thing differ by more than 5%" in told


def test_the_bound_is_that_of_the_slower_of_products_and_copies():
    assert report.share_of_bound(record(SMALL, seconds=1e-3), CEILING) == pytest.approx(0.1)  # 1e7 flops, 1e6 bytes
    assert report.share_of_bound(record(SMALL, seconds=1e-3, bytes=5 * 10**6), CEILING) == pytest.approx(0.5)


def test_the_table_has_the_least_over_the_codes():
    records = [record(Cell("read", 64, C, 1, 1), ratio) for C, ratio in ((32, 3.0), (64, 1.5), (128, 2.0))]
    ((*where, first, second), *more) = [
        line[:3] + line[7:9] for line in report.grid(records, lambda r: r["ratio"], str)
    ]
    assert (where, first, second, more) == (["read", "1", "1"], "1.5", "", [])


def test_the_tiny_memories_are_compared_with_the_block_form():
    told = report.facts([record(TINY, seconds=4096e-6)], CEILING)[-1]
    assert "9.00 × the block form" in told
    flops = float(told.split(", ")[-1].split()[0])
    assert flops == pytest.approx(8.0, rel=0.1)  # about 8,000 operations a memory in a microsecond


def test_every_cell_has_its_square():
    cells = [cell for cell in all_cells() if cell != TINY and cell.operation == "read"]
    squares = [picture.position(cell) for cell in cells]
    assert len(set(squares)) == len(cells)
    assert all(abs(x - u) > 0.999 or abs(y - v) > 0.999 for x, y in squares for u, v in squares if (x, y) != (u, v))


def test_colours_and_numbers_of_ratios():
    shades = [picture.shade(ratio) for ratio in (0.01, 0.25, 0.9, 1.0, 3.0, 40.0, 1e3)]
    assert shades == sorted(shades)
    assert (shades[0], shades[-1]) == (0.0, 1.0)
    assert [picture.number(x) for x in (0.524, 0.999, 1.04, 1.5, 9.97, 123.4)] == [
        ".52",
        "1.00",
        "1.04",
        "1.5",
        "10",
        "123",
    ]


def test_one_memory_in_a_row():
    found = one_memory.record_of("write", (512, 512, 1), {1: 2e-3, 2: 1e-3}, 10**7, 2 * 10**6)
    row = dict(zip(one_memory.HEADERS, one_memory.row(found, CEILING), strict=True))
    assert (row["1 thread ms"], row["all ms"], row["faster"]) == ("2", "1", "2.00")
    assert (row["% product"], row["% copy"]) == ("10%", "20%")


@NATIVE_MISSING
def test_one_memory_is_checked(monkeypatch):
    cell = Cell("update_posterior", 16, 8, 4, 1)
    assert one_memory.measure_cell(cell, 1, 0.0)["note"] == ""
    monkeypatch.setattr(measure.Truth, "error", lambda self, kind, result: 1.0)
    assert one_memory.measure_cell(cell, 1, 0.0)["note"] == "WRONG"


# ---- the command ---------------------------------------------------------------------------------------------------


class Assumed:
    """Ceilings that nobody measured: a test does not depend on time."""

    product, bandwidth, last = {"float32": 1e11}, 1e10, float("inf")

    def measure(self, repeats=1):
        pass

    def describe(self):
        return "assumed"


@NATIVE_MISSING
def test_a_run_writes_everything_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="in the bench extra")
    monkeypatch.setattr(command, "pin", lambda threads: "not pinned: a test")
    monkeypatch.setattr(command, "keep_freed_memory", lambda: "not kept: a test")
    monkeypatch.setattr(command, "Ceiling", Assumed)
    common = ["--seconds", "0", "--no-compile", "--parts", "cells", "--output", str(tmp_path)]
    assert command.main([*common, "--B", "4096"]) == 0  # the tiny memories, which are not in the picture
    assert "Gflop/s in the flops of the block form" in capsys.readouterr().out
    assert not (tmp_path / report.PICTURE).exists()
    arguments = [*common, "--K", "4", "--C", "4", "--T", "1", "--B", "1"]
    assert command.main(arguments) == 0
    data = json.loads((tmp_path / report.JSON).read_text(encoding="utf-8"))
    assert [cell["cell"][0] for cell in data["cells"]] == list(OPERATIONS)
    page = (tmp_path / report.PAGE).read_text(encoding="utf-8")
    assert "3 cells, 3 of them with a ratio" in page
    assert "3 cells, 3 of them with a ratio" in capsys.readouterr().out
    assert (tmp_path / report.PICTURE).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(measure.Sweep, "measure", lambda self, cell: pytest.fail("measured again"))
    assert command.main(arguments) == 0


def test_a_choice_without_cells_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "Ceiling", Assumed)
    monkeypatch.setattr(command, "pin", lambda threads: "not pinned: a test")
    monkeypatch.setattr(command, "keep_freed_memory", lambda: "not kept: a test")
    monkeypatch.setattr(schema, "unavailable", None)
    assert command.main(["--K", "5", "--output", str(tmp_path)]) == 2
    assert "the grid has no such cell" in capsys.readouterr().err
