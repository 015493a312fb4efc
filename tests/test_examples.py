"""Every example runs, and what it returns is what its text says."""

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCS = Path(__file__).parents[1] / "docs"

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="needs the source tree")


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, capsys):
    """Call an example's main, drawing its picture; returns what main returns, and what it printed."""

    def call(name: str, **arguments):
        picture = tmp_path / f"{name}.png"
        returned = load(name).main(**arguments, picture=str(picture))
        assert picture.read_bytes().startswith(b"\x89PNG")
        return returned, capsys.readouterr().out

    return call


def test_quickstart_recalls_better_than_its_cues(run):
    pytest.importorskip("mlxtend")
    errors, told = run("quickstart")
    assert errors["recalled"] < errors["cue"] / 3
    assert f"{errors['recalled']:.3f}" in told


def test_clean_up_repairs_every_pattern(run):
    wrong, _ = run("clean_up")
    assert wrong["cue"] > 0.25
    assert 0 < wrong["one read"] < wrong["cue"] / 2
    assert wrong["attractor read"] == 0
    assert wrong["energy falls"] == 1


def test_training_through_the_memory_learns(run):
    losses, _ = run("train_through_memory")
    assert losses[-1] < losses[0] / 10
    assert losses[-1] < 0.25  # the cues' own error


def test_backends_are_exact(run):
    errors, told = run("compare_backends")
    assert "reference" in errors
    assert all(error < 1e-5 for error in errors.values())
    assert told.count("\n") >= 3


def test_throughput_counts_reads(run):
    rates, told = run("throughput", queries=[1, 4])
    assert list(rates) == [1, 4]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())
    assert told.count("reads a second") == 2


def test_regression_is_the_same_streamed_and_less_sure_in_the_gap(run):
    told, _ = run("weights_given")
    assert told["gap"] < 1e-4
    assert told["without"] > 3 * told["with data"]


def test_a_saved_stream_goes_on_as_if_never_stopped(run):
    pytest.importorskip("safetensors")
    gap, _ = run("save_and_load")
    assert gap < 1e-4


def test_sampled_and_computed_variance_agree(run):
    told, _ = run("uncertainty")
    assert told["sampled"] == pytest.approx(told["computed"], rel=0.05)
    assert told["after"] < told["before"] / 2
    assert told["nats"] == pytest.approx(told["again"], rel=1e-4)


def test_a_removal_is_as_if_the_memory_had_never_seen(run):
    pytest.importorskip("mlxtend")
    told, _ = run("removal")
    assert told["gap"] < 1e-5
    chance = math.sqrt((200 + 2_000 + 1) / (12 * 200 * 2_000))  # of the statistic of Mann and Whitney
    assert told["before"] > 0.5 + 6 * chance
    assert abs(told["after"] - 0.5) < 3 * chance


def test_every_example_is_tested_shown_and_drawn():
    on_several_processes = {"sharded_memory"}  # tests/test_distributed.py runs it
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"__init__"} - on_several_processes
    tested = Path(__file__).read_text()
    shown = (DOCS / "examples.md").read_text()
    for name in names:
        assert f'run("{name}"' in tested
        assert f"{{literalinclude}} ../examples/{name}.py" in shown
        assert f"images/{name}.png" in shown
        assert (DOCS / "images" / f"{name}.png").exists()
        assert 25 <= len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 70
