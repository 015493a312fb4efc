"""`make gpu`: without a GPU it says what it skips; on a simulated one every step runs, is cut short, and fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastkm.testing.episodes import build_episode
from fastkm.testing.operations import Case, computation
from fastkm.testing.presets import PRESETS, Preset

pytest.importorskip("benchmarks.gpu", reason="needs the source tree")
from simulated_gpu import CASES

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import candidates, data, plan, report, runner, steps, worker
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.steps import Outcome, Run
from build_support import cuda

ROOT = Path(__file__).parents[1]
LINE = {"item": "a test", "outcome": "passed", "told": ""}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Journals and logs of a test, beside those of a run that may be going on."""
    monkeypatch.setattr(steps, "WORK", tmp_path / "work")


def read(folder: Path) -> tuple[dict, dict]:
    found = json.loads((folder / "gpu.json").read_text())
    return found, {step["step"]: step for step in found["steps"]}


# ---- without a device ----------------------------------------------------------------------------------------------


def have_no_device(run: Run) -> Outcome:
    run.device = {"device": "none", "no device": "no driver", "triton": "3.8.0"}
    return Outcome("passed", "no device")


def have_library(run: Run) -> Outcome:
    run.package = {"package": "fastkm", "library": "fastkm/_C.abi3.so", "architectures": [90]}
    return Outcome("passed", "built")


def replace_steps(monkeypatch, **works):
    """The steps of these names, with - for _, do something else."""
    works = {name.replace("_", "-"): work for name, work in works.items()}
    changed = [step._replace(work=works.pop(step.name, step.work)) for step in plan.STEPS]
    assert not works
    monkeypatch.setattr(command, "STEPS", tuple(changed))


def test_without_a_device_each_step_that_needs_one_says_so(monkeypatch, tmp_path, capsys):
    shown = {"machine_code": lambda run: Outcome("passed", "3 passed")}  # has a test of its own
    replace_steps(monkeypatch, machine=have_no_device, build=have_library, **shown)
    assert command.main(["--output", str(tmp_path)]) == 0
    found, by_name = read(tmp_path)
    assert [step["step"] for step in found["steps"]] == [step.name for step in plan.STEPS]
    skipped = {name for name, step in by_name.items() if step["status"] == "skipped"}
    assert skipped == {step.name for step in plan.STEPS} - {"machine", "build", "machine-code"}
    assert {by_name[name]["told"] for name in skipped} == {"needs a GPU that torch can use; no driver"}
    assert found["records"] == found["verified"] == []
    page = (tmp_path / "gpu.md").read_text()
    assert "Nothing was timed." in page
    assert "not a measurement" in page
    assert "| tests-triton | skipped |" in page
    assert "no driver" in capsys.readouterr().out


def test_the_probe_says_what_there_is(tmp_path):
    run = Run(steps.surroundings(), ends=time.monotonic() + 100)
    assert steps.machine(run).status == "passed"
    assert run.device["torch"] == torch.__version__
    assert run.device["cores"] == len(os.sched_getaffinity(0))
    assert (run.device["device"] == "none") == (not torch.cuda.is_available())
    package = run.probe("package")
    assert Path(package["package"]) == ROOT / "fastkm"


@pytest.mark.parametrize(
    ("device", "package", "reason"),
    [
        ({"device": "none", "no device": "torch is a build without CUDA"}, {}, "torch is a build without CUDA"),
        ({"device": "old", "capability": 75}, {}, "old has 7.5"),
        ({"device": "new", "capability": 90, "triton": None}, {}, "Triton, which is not installed"),
    ],
)
def test_what_a_backend_needs(device, package, reason):
    with pytest.raises(runner.Skip, match=reason):
        Run({}, device=device, package=package).need("triton")


def test_native_needs_a_library_with_cuda():
    with pytest.raises(runner.Skip, match="it does not load"):
        Run({}, device={"device": "new", "capability": 90}, package={"unavailable": "it does not load"}).need("native")


def test_processes_share_the_device_as_it_allows():
    device = {"cores": 16, "GiB": 139.0, "nvidia-smi": ["580", "Default"]}
    assert Run({}, device=device).processes() == 16
    assert Run({}, device=device | {"GiB": 8.0}).processes() == 4
    assert Run({}, device=device | {"nvidia-smi": ["580", "Exclusive_Process"]}).processes() == 1


def test_make_takes_the_python_that_is_there():
    say = ("make", "--no-print-directory", "--dry-run", "gpu", "SYSTEM=1", "PYTHON=/some/python3", "ARGS=--plan")
    said = subprocess.run(say, cwd=ROOT, capture_output=True, text=True).stdout
    assert said.splitlines() == ["/some/python3 -m benchmarks.gpu --plan"]


def test_the_plan_times_every_preset_and_fits_the_budget(capsys):
    assert command.main(["--plan"]) == 0
    assert "smoke-native" in capsys.readouterr().out
    timed = [step.work.keywords["settings"] for step in plan.STEPS if step.name.startswith("timings")]
    assert {setting.partition(":")[0] for settings in timed for setting in settings} == set(PRESETS)
    asked_for = [step.expected for step in plan.STEPS if not step.name.startswith("timings-")]
    assert sum(asked_for) <= plan.BUDGET


# ---- what is called passed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "finished", "status", "told"),
    [
        ([LINE], True, "passed", "1 passed"),
        ([LINE, {**LINE, "outcome": "skipped"}], True, "passed", "1 passed, 1 skipped"),
        ([], True, "failed", "nothing was found to run"),
        ([{**LINE, "outcome": "skipped", "told": "no nvcc"}], True, "skipped", "1 skipped: no nvcc"),
        ([LINE, {**LINE, "outcome": "failed", "told": "...\nwrong"}], True, "failed", "1 failed: a test: wrong"),
        ([LINE], False, "cut short", "its time was up"),
        ([], False, "cut short", "none ran; its time was up"),
        ([{**LINE, "outcome": "failed", "told": "wrong"}], False, "failed", "wrong; its time was up"),
    ],
)
def test_only_a_step_that_showed_something_has_passed(lines, finished, status, told):
    outcome = steps.judged(lines, finished, "tests")
    assert outcome.status == status
    assert told in outcome.told


SANITIZER_SAYS = {
    "========= ERROR SUMMARY: 0 errors": "passed",
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)": "passed",
    "========= ERROR SUMMARY: 3 errors": "failed",
    "========= RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)": "failed",
    "Segmentation fault": "failed",
}


@pytest.mark.parametrize("said", SANITIZER_SAYS)
def test_a_sanitizer_without_a_summary_has_shown_nothing(tmp_path, said):
    def words(journal):
        note = f"from benchmarks.gpu.journal import Journal; Journal({str(journal.path)!r}).end('a test', 'passed')"
        return sys.executable, "-c", f"{note}; print({said!r})"

    ran = runner.Worker(as_paths(words), tmp_path / "memcheck", dict(os.environ), 60, (0, steps.SANITIZER_ERRORS))
    assert runner.drive([ran], lambda: 60, lambda: None)
    test, tool = steps.sanitized("memcheck", ran)
    assert (test["item"], test["outcome"]) == ("memcheck: a test", "passed")
    assert tool["outcome"] == SANITIZER_SAYS[said]


def test_what_is_sanitized_exists():
    say = (sys.executable, "-m", "pytest", *steps.SANITIZED, "--kernels=simt", "--collect-only", "-q")
    said = subprocess.run(say, cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f"test_{family}.py" in said for family in ("posterior", "writing", "reading", "matrix_normal"))


# ---- workers -------------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.journal import Journal
journal = Journal(Path(sys.argv[1]))
for item in "abcd":
    if item in journal.read().ended:
        continue
    journal.begin(item, "work")
    if item == "b":
        {fault}
    journal.end(item, "passed")
"""
FAULTS = {
    "os._exit(9)": "the process ended with 9 at work",
    "os.kill(os.getpid(), 11)": "the process ended with -11 at work",
    "time.sleep(1e6)": "nothing for 3 s, stopped at work",
    "journal.end('b', 'failed', 'an illegal access'); os._exit(75)": "an illegal access",
    "raise ValueError('wrong')": "ValueError: wrong",
}


def as_paths(words):
    return lambda journal: tuple(map(str, words(journal)))


@pytest.mark.parametrize("fault", FAULTS)
def test_an_item_that_ends_its_process_is_told_and_the_others_are_done(tmp_path, fault):
    def words(journal):
        return sys.executable, "-c", WORKER.format(fault=fault), journal.path

    ran = runner.Worker(as_paths(words), tmp_path / "0", dict(os.environ, PYTHONPATH=str(ROOT)), patience=3)
    assert runner.drive([ran], lambda: 60, lambda: None)
    lines = {line["item"]: line for line in runner.lines_of([ran])}
    assert {item: line["outcome"] for item, line in lines.items()} == {
        "a": "passed", "b": "failed", "c": "passed", "d": "passed",
    }  # fmt: skip
    assert FAULTS[fault] in lines["b"]["told"]


def test_a_worker_that_cannot_start_is_told_and_not_tried_again(tmp_path):
    words = as_paths(lambda journal: (sys.executable, "-c", "import nonsense"))
    ran = runner.Worker(words, tmp_path / "0", dict(os.environ), patience=60)
    assert runner.drive([ran], lambda: 60, lambda: None)
    (line,) = runner.lines_of([ran])
    assert line["outcome"] == "failed"
    assert "No module named 'nonsense'" in line["told"]
    assert ran.restarts == 0


FAULTY = """
import sys, uuid
from benchmarks.gpu.journal import Journal
Journal(sys.argv[1]).begin(uuid.uuid4().hex)
1 / 0
"""


def test_restarts_have_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESTARTS", 2)
    words = as_paths(lambda journal: (sys.executable, "-c", FAULTY, journal.path))
    ran = runner.Worker(words, tmp_path / "0", dict(os.environ, PYTHONPATH=str(ROOT)), 60)
    assert runner.drive([ran], lambda: 60, lambda: None)
    lines = runner.lines_of([ran])
    assert len(lines) == 4
    assert "not run: 2 items ended their process" in lines[-1]["told"]


def test_time_that_is_up_stops_what_a_command_started(tmp_path):
    until = time.monotonic() + 2
    script = "sleep 1000 & echo $!; wait"
    with pytest.raises(runner.CutShort, match="was stopped"):
        runner.run(("sh", "-c", script), tmp_path / "log", dict(os.environ), lambda: until - time.monotonic())
    child = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_line_cut_in_half_spoils_no_other(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.end("a", "passed")
    journal.begin("b")
    with journal.path.open("a") as file:
        file.write('\n{"item": "b", "out')
    journal.end("c", "passed")
    entries = journal.read()
    assert entries.ended.keys() == {"a", "c"}
    assert entries.open == "b"


# ---- a run that is cut short ---------------------------------------------------------------------------------------


def test_the_budget_ends_a_step_and_skips_the_rest(monkeypatch, tmp_path):
    def slow(run):
        run.command("slow", "sleep", "1000")

    replace_steps(monkeypatch, machine=have_no_device, build=slow)
    assert command.main(["--output", str(tmp_path), "--budget", "2"]) == 0
    _, by_name = read(tmp_path)
    assert by_name["machine"]["status"] == "passed"
    assert by_name["build"]["status"] == "cut short"
    assert "after 1 s" in by_name["build"]["told"]  # its share of the budget


def test_a_spent_budget_is_named(monkeypatch, tmp_path):
    replace_steps(monkeypatch, machine=lambda run: time.sleep(1.1) or have_no_device(run))
    command.main(["--output", str(tmp_path), "--budget", "1"])
    _, by_name = read(tmp_path)
    assert by_name["machine"]["status"] == "passed"
    assert {step["status"] for name, step in by_name.items() if name != "machine"} == {"skipped"}
    assert by_name["build"]["told"] == "the budget of 1 s was spent; --budget takes more"


def test_a_signal_leaves_what_was_found(tmp_path):
    script = (
        "from benchmarks.gpu import __main__ as command, steps\n"
        "from pathlib import Path\n"
        f"steps.WORK = Path({str(tmp_path / 'work')!r})\n"
        "first, second, *rest = command.STEPS\n"
        "first = first._replace(work=lambda run: steps.Outcome('passed', 'shown'))\n"
        "second = second._replace(work=lambda run: run.command('slow', 'sleep', '1000'))\n"
        "command.STEPS = (first, second, *rest)\n"
        f"raise SystemExit(command.main(['--output', {str(tmp_path)!r}]))\n"
    )
    with subprocess.Popen((sys.executable, "-c", script), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while "build ..." not in process.stdout.readline():
            pass
        _, before = read(tmp_path)
        assert before["machine"]["status"] == "passed", "the report is written after every step"
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    _, by_name = read(tmp_path)
    assert (by_name["build"]["status"], by_name["build"]["told"]) == ("cut short", "stopped by SIGTERM")
    assert by_name["timings"]["status"] == "skipped"
    assert "| build | cut short |" in (tmp_path / "gpu.md").read_text()


def test_a_step_that_fails_is_told_and_the_others_run(monkeypatch, tmp_path):
    def fail(run):
        run.command("wrong", sys.executable, "-c", "raise SystemExit('a kernel is wrong')")

    replace_steps(monkeypatch, machine=have_no_device, build=have_library, machine_code=fail)
    assert command.main(["--output", str(tmp_path)]) == 1
    _, by_name = read(tmp_path)
    assert by_name["machine-code"]["status"] == "failed"
    assert "a kernel is wrong" in by_name["machine-code"]["told"]
    assert by_name["timings-large"]["status"] == "skipped"


# ---- the build -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A tree of two sources and the library of an earlier build; says what the build was asked for."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "fastkm").mkdir()
    (tmp_path / "csrc" / "kernel.cu").touch()
    (tmp_path / "setup.py").touch()
    library = tmp_path / "fastkm" / "_C.abi3.so"
    library.touch()
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    monkeypatch.delenv("FASTKM_CUDA_ARCH", raising=False)
    run = Run({}, device={"device": "simulated", "capability": 90, "nvcc": "/usr/bin/nvcc"})
    built = SimpleNamespace(library=library, run=run, asked=None, holds=[90])

    def build(log, *words, **environment):
        assert not library.exists(), "a build that fails leaves no library of other sources"
        built.asked = environment
        library.touch()

    run.command = build
    run.probe = lambda _: {
        "unavailable": None, "architectures": built.holds, "library": str(library), "package": "p", "fastkm": "1",
    }  # fmt: skip
    return built


def newer(path: Path, than: Path) -> None:
    os.utime(path, (than.stat().st_mtime + 10,) * 2)


def test_a_library_newer_than_its_sources_is_kept(checkout):
    newer(checkout.library, checkout.library)
    assert steps.build(checkout.run).told.startswith("up to date: ")
    assert checkout.asked is None


@pytest.mark.parametrize("stale", ["csrc/kernel.cu", "setup.py"])
def test_a_library_older_than_a_source_is_built_again_for_the_device(checkout, stale):
    newer(steps.ROOT / stale, checkout.library)
    assert "sm_90" in steps.build(checkout.run).told
    assert checkout.asked["FASTKM_CUDA_ARCH"] == "90"
    assert checkout.asked["FASTKM_CUDA"] == "1"


@pytest.mark.parametrize("named", ["80", "80, 90"])
def test_the_environment_names_the_devices(checkout, monkeypatch, named):
    newer(checkout.library, checkout.library)
    monkeypatch.setenv("FASTKM_CUDA_ARCH", named)
    steps.build(checkout.run)
    assert checkout.asked["FASTKM_CUDA_ARCH"] == named


def test_a_build_without_cuda_kernels_has_failed(checkout):
    checkout.holds = []
    with pytest.raises(RuntimeError, match="does not serve"):
        steps.build(checkout.run)


def test_without_nvcc_nothing_is_built(checkout):
    newer(steps.ROOT / "setup.py", checkout.library)
    checkout.run.device["nvcc"] = None
    with pytest.raises(runner.Skip, match="needs nvcc"):
        steps.build(checkout.run)
    assert checkout.library.exists()


@pytest.mark.parametrize(
    ("named", "meant"), [("", cuda.ARCHITECTURES), ("90", (90,)), ("90, 80", (80, 90)), ("120", (120,))]
)
def test_architectures_that_the_build_takes(monkeypatch, named, meant):
    monkeypatch.setenv("FASTKM_CUDA_ARCH", named)
    assert cuda.wanted_architectures() == meant


@pytest.mark.parametrize("named", ["9.0", "sm_90", "75", "90,", "90;100", "all", "-90"])
def test_architectures_that_the_build_refuses(monkeypatch, named):
    monkeypatch.setenv("FASTKM_CUDA_ARCH", named)
    with pytest.raises(SystemExit, match="FASTKM_CUDA_ARCH must be compute capabilities"):
        cuda.wanted_architectures()


# ---- verdicts ------------------------------------------------------------------------------------------------------

TINY = Preset("tiny", 7, 12, 9)


@pytest.fixture(scope="module")
def episode():
    return build_episode(data.synthetic_images(), TINY, 2, worker.QUERIES, 2).to(torch.float32)


def test_synthetic_images_are_the_same_each_time_and_serve_every_preset():
    images = data.synthetic_images()
    assert images.held_out.equal(data.synthetic_images().held_out)
    assert images.held_out.min() >= 0
    assert images.held_out.max() <= 1
    largest = max(preset.C for preset in PRESETS.values())
    assert images.components.variances[largest - 1] > 1e-6 * images.components.variances[0]


@pytest.mark.parametrize("case", [Case("write"), Case("read", True)], ids=str)
def test_a_right_candidate_passes_and_a_wrong_one_does_not(episode, case):
    judge, right = candidates.Judge(case, episode), computation(case).run(episode, "reference")
    for name in ("reference", candidates.COMPILED):
        assert judge.verdict(name, lambda: right).ok
        wrong = judge.verdict(name, lambda: {field: 1.01 * x for field, x in right.items()})
        assert not wrong.ok
        assert "is off" in wrong.note
    assert (candidates.BLOCK_FORM in candidates.candidates(case, episode, candidates.KINDS)) == (case == Case("write"))
    assert candidates.candidates(case, episode, ["native"]).keys() == {"native", "native tf32", "native tf32x3"}


@pytest.mark.parametrize("case", [Case("update_posterior"), Case("write"), Case("read"), Case("write", True)], ids=str)
def test_a_precision_is_allowed_its_own_rounding_and_no_more(monkeypatch, episode, case):
    def run_with(bits):
        def coarse(x):
            return candidates.rounded(x, bits)

        state = {name: getattr(episode, name)._replace(mean=coarse(getattr(episode, name).mean))
                 for name in ("prior", "written")}  # fmt: skip
        given = {name: coarse(getattr(episode, name)) for name in ("weights", "values", "queries")}
        return lambda: computation(case).run(episode._replace(**state, **given), "reference")

    judge = candidates.Judge(case, episode)
    monkeypatch.setattr(judge, "unavailable", lambda name: None)
    right = {("native tf32", 10): True, ("native tf32", 5): False, ("native tf32x3", 20): True,
             ("native tf32x3", 10): False, ("native", 10): False}  # fmt: skip
    assert {key: judge.verdict(key[0], run_with(key[1])).ok for key in right} == right


# ---- a simulated device --------------------------------------------------------------------------------------------

SANITIZER = """#!/bin/sh
while case $1 in --*) true;; *) false;; esac; do shift 2; done
"$@"; status=$?
echo "========= ERROR SUMMARY: 0 errors"
exit $status
"""


@pytest.fixture
def simulated(monkeypatch, tmp_path):
    """Every process of the command runs on a simulated device."""
    pytest.importorskip("triton")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text(SANITIZER)
    (tools / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tools), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(runner, "PYTHON", (sys.executable, "-m", "simulated_gpu"))
    monkeypatch.setattr(steps, "PROCESSES", 2)
    monkeypatch.setattr(steps, "CHECKED", ("S:64",))
    monkeypatch.setattr(steps, "TESTS", ("tests/gpu/test_matrix_normal.py",))
    monkeypatch.setattr(steps, "SANITIZED", ("tests/gpu/test_matrix_normal.py", "-k", "memory_in_the_batch"))
    monkeypatch.setattr(steps, "SANITIZER_TOOLS", ("memcheck",))
    return ["--output", str(tmp_path), "--rounds", "2", "--budget", "2000"]


def test_every_step_on_a_simulated_device(simulated, monkeypatch, tmp_path):
    shown = {"machine_code": lambda run: Outcome("passed", "1 passed")}  # has a test of its own
    few = {
        "timings": plan.timed("timings", "S:64", plan.QUICK),
        "timings_batches": plan.timed("batches", "M:1 L:1", ("native", "reference")),
        "timings_large": plan.timed("large", "XL:64 LLM:64", ("native",)),
    }  # Triton's interpreter takes seconds for a call
    replace_steps(monkeypatch, build=have_library, **shown, **few)
    assert command.main(simulated) == 0, (tmp_path / "gpu.md").read_text()
    found, by_name = read(tmp_path)
    assert {step["status"] for step in by_name.values()} == {"passed"}
    assert found["machine"]["device"] == "simulated"
    for name in ("tests-native", "tests-triton", "smoke-native", "smoke-triton", "sanitizer"):
        assert by_name[name]["counts"]["passed"] >= 3
    verified = {(Case(r["operation"], r["gradient"]), r["candidate"]) for r in found["verified"]}
    assert {case for case, _ in verified} == set(CASES)
    assert (Case("write", True), "triton tf32x3") in verified
    timed = {
        (r["preset"], r["batch"], Case(r["operation"], r["gradient"]), r["candidate"]): r for r in found["records"]
    }
    assert {preset for preset, *_ in timed} == set(PRESETS)
    assert {case for _, _, case, _ in timed} == set(CASES)
    assert timed["S", 64, Case("write"), "reference"]["seconds"]["cold"]["median"] == 0.5e-3
    assert all(record["seconds"].keys() == set(report.MODES) for record in timed.values())
    exact, coarse = (timed["S", 64, Case("write"), name] for name in ("native", "native tf32"))
    assert coarse["bound_seconds"] <= exact["bound_seconds"]
    page = (tmp_path / "gpu.md").read_text()
    assert "| write + ∇ | S | 64 | native tf32x3 |" in page
    assert "500.0" in page


@pytest.mark.parametrize("fault", ["exit", "lost", "wrong"])
def test_a_candidate_with_a_fault_is_told_and_not_timed(simulated, monkeypatch, tmp_path, fault):
    monkeypatch.setenv("SIMULATED_FAULT", f"{fault} write native")
    few = plan.timed("timings", "S:64", ("native", "reference"))
    replace_steps(monkeypatch, build=have_library, timings=few)
    assert command.main([*simulated, "--steps", "smoke-native", "timings"]) == 1
    found, by_name = read(tmp_path)
    smoke = by_name["smoke-native"]
    assert smoke["counts"]["failed"] == len(steps.CHECKED), "at every preset"
    told = {"exit": "the process ended with 9", "lost": "illegal memory access", "wrong": "mean is off"}[fault]
    assert all(failure["item"].startswith("write ") for failure in smoke["failures"])
    assert all(told in failure["told"] for failure in smoke["failures"])
    refused = [r for r in found["records"] if "seconds" not in r]
    assert {(r["operation"], r["gradient"], r["candidate"]) for r in refused} == {("write", False, "native")}
    assert by_name["timings"]["status"] == "passed"
