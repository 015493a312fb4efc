"""The checkers find every bug that is planted in small kernels, and none in the kernels of the package."""

import os
import subprocess

import pytest

from simt.build import ROOT, build

# A bug, and what finds it: a sanitizer, an error of the runtime that holds these words, or a wrong result. One schedule
# may hide a bug that another shows.
BUGS = (
    ("missing barrier", "thread"),
    ("warp-synchronous tail", "thread"),
    ("divergent barrier", "barrier"),
    ("bad mask", "warp operation"),
    ("shared memory out of bounds", "address"),
    ("global memory out of bounds", "address"),
    ("race between blocks", "thread"),
    ("missing fence", "thread"),
    ("stage reused too early", "thread"),
    ("swapped fragments", "wrong results"),
    ("shared memory never written", "wrong results"),
)
SCHEDULES = ("0", "-1", "1", "2", "3")
REPORTS = {"thread": "WARNING: ThreadSanitizer: data race", "address": "ERROR: AddressSanitizer"}


def run(program, *arguments, **environment) -> str:
    quiet = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1:report_bugs=1",
    }
    done = subprocess.run([program, *arguments], env=os.environ | quiet | environment, capture_output=True, text=True)
    known = "ASan doesn't fully support makecontext/swapcontext functions"
    return "".join(line for line in (done.stdout + done.stderr).splitlines(keepends=True) if known not in line)


@pytest.fixture(scope="module")
def planted(request):
    if request.config.getoption("--kernels") != "simt":
        return {}  # nothing is compiled for tests that are skipped
    sources = [ROOT / "tests/simt/planted.cu"]
    return {sanitizer: build(sanitizer, "program", sources) for sanitizer in ("plain", "address", "thread")}


@pytest.mark.parametrize("sanitizer", ["plain", "address", "thread"])
def test_without_a_bug_nothing_is_reported(planted, sanitizer):
    for seed in SCHEDULES:
        assert run(planted[sanitizer], "0", FASTKM_SIMT_SEED=seed) == "clean\n"


@pytest.mark.parametrize("number", range(1, len(BUGS) + 1), ids=[bug.replace(" ", "-") for bug, _ in BUGS])
def test_planted_bug_is_found(planted, number):
    _, finder = BUGS[number - 1]
    program = planted[finder if finder in REPORTS else "plain"]
    outputs = []
    for seed in SCHEDULES:
        outputs.append(run(program, str(number), FASTKM_SIMT_SEED=seed))
        if REPORTS.get(finder, finder) in outputs[-1]:
            return
    pytest.fail(f"no schedule shows it: {outputs}")


@pytest.mark.parametrize("shared", ["232448", "24000"], ids=["on-chip", "in-the-workspace"])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernels_are_clean(sanitizer, shared):
    kernels = sorted((ROOT / "csrc").glob("cuda/**/*.cu"))
    program = build(sanitizer, "program", [ROOT / "tests/simt/races.cpp", *kernels])
    output = run(program, FASTKM_SIMT_SHARED=shared, FASTKM_SIMT_SEED="1")
    assert output == "clean\n", output
