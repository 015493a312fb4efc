"""What each step runs, and what it takes for a step to be called passed: something was shown, and nothing was wrong."""

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

from benchmarks.gpu import runner
from benchmarks.gpu.journal import Journal, Line, count
from benchmarks.gpu.probe import LEAST_CAPABILITY
from benchmarks.gpu.runner import ROOT, Skip, Worker, drive, lines_of, module

WORK = ROOT / "build" / "gpu"  # logs, journals and caches; not what is reported
SOURCES = ("csrc", "setup.py", "build_support")
CHECKED = ("S:64", "M:64", "L:64")  # presets and batch of the smoke checks
TESTS: tuple[str, ...] = ("tests/gpu",)
SANITIZED = ("tests/gpu", "-k", "memory_in_the_batch")  # few and small: the sanitizer is 10 to 100 times slower
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_ERRORS = 66  # exit status where the sanitizer found errors
PROCESSES = 16  # at most, on one device
GIB_OF_A_PROCESS = 2  # on the device: a context, the code of all kernels, and a case of tests or verification
SHOWN = 5  # failures that a step's own words list; the report has them all
PATIENCE, LONG_PATIENCE = 75.0, 600.0  # seconds for one item


class Outcome(NamedTuple):
    status: str  # passed, failed, skipped or cut short
    told: str
    more: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Run:
    """What the steps share."""

    environment: dict[str, str]
    data: str | None = None
    rounds: int = 30
    tick: Callable[[], None] = lambda: None
    device: dict[str, Any] = field(default_factory=dict)  # by the probe
    package: dict[str, Any] = field(default_factory=dict)
    verified: list[Journal] = field(default_factory=list)
    timed: list[Journal] = field(default_factory=list)
    ends: float = 0.0  # of the present step, by the monotonic clock
    stopped: int = 0  # the signal that asked for the end

    def ask_to_stop(self, number: int, _: FrameType | None) -> None:
        """A signal comes in the middle of anything: it is heard where a step waits."""
        self.stopped = number

    def time_left(self) -> float:
        if self.stopped:
            raise runner.Stopped(signal.Signals(self.stopped).name)
        return self.ends - time.monotonic()

    def command(self, log: str, *words: str, **environment: str) -> str:
        return runner.run(words, WORK / f"{log}.log", self.environment | environment, self.time_left)

    def probe(self, what: str) -> dict[str, Any]:
        said = self.command(f"probe-{what}", *module("benchmarks.gpu.probe", what))
        return json.loads(said.splitlines()[-1])

    def need_device(self) -> None:
        if self.device.get("device", "none") == "none":
            raise Skip(f"needs a GPU that torch can use; {self.device.get('no device', 'there is none here')}")
        if self.device["capability"] < LEAST_CAPABILITY:
            raise Skip(f"needs compute capability 8.0; {self.device['device']} has {self.device['capability'] / 10}")

    def need(self, backend: str) -> None:
        self.need_device()
        if backend == "triton" and not self.device["triton"]:
            raise Skip("needs Triton, which is not installed")
        if backend == "native" and not self.package.get("architectures"):
            raise Skip(f"needs the CUDA kernels; {self.package.get('unavailable') or 'they were not built'}")

    def processes(self) -> int:
        """How many workers share the device."""
        if "Exclusive" in "".join(self.device["nvidia-smi"]):
            return 1
        return max(1, min(self.device["cores"], PROCESSES, int(self.device["GiB"] / GIB_OF_A_PROCESS)))


def surroundings() -> dict[str, str]:
    """The environment of every command: this checkout's package, and caches where there is room and leave to write."""
    own = {
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "CUDA_CACHE_PATH": "cuda",
        "TMPDIR": "tmp",
    }
    folders = {name: str(WORK / "cache" / folder) for name, folder in own.items()}
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **folders, **threads}


# ---- steps without a worker -----------------------------------------------------------------------------------------


def machine(run: Run) -> Outcome:
    """Python, torch, the device and its driver, the CUDA toolkit, the room on the disk."""
    run.device = found = run.probe("device")
    words = [f"{name} {found[name]}" for name in ("python", "torch", "triton", "cores")]
    words.append(f"device {found['device']}" + (f" ({found['no device']})" if "no device" in found else ""))
    words += [f"{name} {found[name] or 'absent'}" for name in ("nvcc", "compute-sanitizer")]
    absent = [name for name in ("setuptools", "pytest", "hypothesis", "ninja") if not found[name]]
    remarks = [f"not installed: {', '.join(absent)}"] if absent else []
    if found["driver"] and found["nvcc version"] and found["driver"] < found["nvcc version"]:
        remarks.append(
            f"the driver runs CUDA {as_version(found['driver'])} and nvcc is {as_version(found['nvcc version'])}: "
            "code for this very device can run, PTX cannot"
        )
    free = shutil.disk_usage(WORK).free / 2**30
    if free < 3:
        remarks.append(f"{free:.1f} GiB free in {WORK}")
    return Outcome("passed", "; ".join([*words, *remarks]), {"found": found})


def as_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def build(run: Run) -> Outcome:
    """The C++ and CUDA kernels of this checkout, in place, for the device that is there or for FASTKM_CUDA_ARCH."""
    library, wanted = ROOT / "fastkm" / "_C.abi3.so", wanted_architectures(run)
    if library.exists() or run.device["nvcc"] is None:
        run.package = run.probe("package")
        if not run.package["unavailable"] and up_to_date(library, run.package["architectures"], wanted):
            return Outcome("passed", f"up to date: {library_told(run)}", {"package": run.package})
    if run.device["nvcc"] is None:
        raise Skip(f"needs nvcc, which is not there; {library_told(run)}")
    library.unlink(missing_ok=True)  # nothing may run a library of other sources
    variables = {"FASTKM_CUDA": "1", "FASTKM_NO_EXT": "0", **({"FASTKM_CUDA_ARCH": wanted} if wanted else {})}
    run.command("build", sys.executable, "setup.py", "build_ext", "--inplace", **variables)
    run.package = run.probe("package")
    if run.package["unavailable"] or not run.package["architectures"]:
        raise RuntimeError(f"the library that was built does not serve: {library_told(run)}")
    return Outcome("passed", f"built: {library_told(run)}", {"package": run.package})


def wanted_architectures(run: Run) -> str:
    """FASTKM_CUDA_ARCH, or the device's own; empty for all."""
    return os.environ.get("FASTKM_CUDA_ARCH") or str(run.device.get("capability", ""))


def up_to_date(library: Path, built: list[int], wanted: str) -> bool:
    files = [path for name in SOURCES for path in [ROOT / name, *(ROOT / name).rglob("*")]]
    sources = [path for path in files if path.is_file() and path.suffix != ".pyc"]
    newest = max(path.stat().st_mtime for path in sources)
    there = {str(architecture) for architecture in built}
    return bool(built) and library.stat().st_mtime > newest and {w.strip() for w in wanted.split(",") if w} <= there


def library_told(run: Run) -> str:
    package = run.package
    devices = ", ".join(f"sm_{architecture}" for architecture in package["architectures"]) or "no device"
    kernels = package["unavailable"] or f"CUDA kernels for {devices}"
    return f"{package['library'] or 'no library'}, {kernels}; package {package['package']} {package['fastkm']}"


# ---- steps of workers ----------------------------------------------------------------------------------------------


def judged(lines: list[Line], finished: bool, of: str) -> Outcome:
    """What the items of a step add up to."""
    counts = count(lines)
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if counts[outcome])
    told = f"{of}: {told or 'none ran'}"
    failures = [line for line in lines if line["outcome"] == "failed"]
    more = {"counts": dict(counts), "failures": [{k: line[k] for k in ("item", "told")} for line in failures]}
    if failures:
        shown = "; ".join(f"{line['item']}: {line['told'].strip().splitlines()[-1]}" for line in failures[:SHOWN])
        cut = "" if finished else "; its time was up before all had run"
        return Outcome("failed", f"{told}: {shown}{cut}", more)
    if not finished:
        return Outcome("cut short", f"{told}; its time was up before all had run", more)
    if counts["passed"]:
        return Outcome("passed", told, more)
    if not lines:
        return Outcome("failed", f"{of}: nothing was found to run", more)
    reasons = Counter(line["told"] for line in lines).most_common(2)
    return Outcome("skipped", f"{told}: {'; '.join(reason for reason, _ in reasons)}", more)


def run_tests(run: Run, name: str, selection: Sequence[str], shards: int, patience: float = PATIENCE) -> Outcome:
    """Tests of the checkout in several processes."""

    def words(shard: int) -> Callable[[Journal], tuple[str, ...]]:
        plugin = ("-p", "benchmarks.gpu.pytest_journal", "-p", "no:cacheprovider", "--shard", f"{shard}/{shards}")
        return lambda journal: module("pytest", *plugin, "--journal", journal.path, *selection)

    own = run.environment | {"OMP_NUM_THREADS": "1"}
    workers = [Worker(words(i), WORK / name / str(i), own, patience) for i in range(shards)]
    finished = drive(workers, run.time_left, run.tick)
    return judged(lines_of(workers), finished, f"tests of {run.package.get('package')}")


def machine_code(run: Run) -> Outcome:
    """Registers, spills, atomics, wide loads and tensor cores in the machine code of the library, nothing run."""
    return run_tests(run, "machine-code", ("tests/test_cuda_budgets.py",), 1, LONG_PATIENCE)


def device_tests(run: Run, backend: str) -> Outcome:
    """Every test of the kernels of one backend on the device."""
    run.need(backend)
    return run_tests(run, f"tests-{backend}", (*TESTS, "--kernels=gpu", "-k", backend), run.processes())


def smoke(run: Run, backend: str) -> Outcome:
    """Every operation and gradient of one backend at presets S to L against float64; Triton compiles its kernels."""
    run.need(backend)
    shards = run.processes()

    def words(shard: int) -> Callable[[Journal], tuple[str, ...]]:
        return lambda journal: work(run, journal, CHECKED, (backend,), "--shard", f"{shard}/{shards}")

    own = run.environment | {"OMP_NUM_THREADS": "1"}
    workers = [Worker(words(i), WORK / f"smoke-{backend}" / str(i), own, PATIENCE) for i in range(shards)]
    run.verified += [worker.journal for worker in workers]
    finished = drive(workers, run.time_left, run.tick)
    return judged(lines_of(workers), finished, f"results of {run.package.get('library')}")


def work(run: Run, journal: Journal, settings: Sequence[str], kinds: Sequence[str], *more: object) -> tuple[str, ...]:
    data = ("--data", run.data) if run.data else ()
    options = ("--journal", journal.path, "--settings", *settings, "--kinds", *kinds, *data, *more)
    return module("benchmarks.gpu.worker", *options)


def timings(run: Run, name: str, settings: Sequence[str], kinds: Sequence[str], patience: float = PATIENCE) -> Outcome:
    """Candidates on a device that does nothing else, each verified first."""
    run.need_device()
    earlier = ("--earlier", *(journal.path for journal in run.verified)) if run.verified else ()

    def words(journal: Journal) -> tuple[str, ...]:
        return work(run, journal, settings, kinds, "--time", "--rounds", run.rounds, *earlier)

    worker = Worker(words, WORK / name, run.environment, patience)
    run.timed.append(worker.journal)
    finished = drive([worker], run.time_left, run.tick)
    entries = worker.journal.read()
    return judged(list(entries.ended.values()), finished, f"candidates on {entries.facts.get('data', 'no data')}")


def sanitize(run: Run) -> Outcome:
    """A few small tests of each backend under each tool of compute-sanitizer."""
    run.need_device()
    program = run.device["compute-sanitizer"]
    if program is None:
        raise Skip("needs compute-sanitizer of the CUDA toolkit, which is not there")
    backends = [name for name in ("native", "triton") if can(run, name)]
    if not backends:
        raise Skip("needs kernels of one backend at least")
    try:
        run.command("sanitizer-probe", program, *module("benchmarks.gpu.probe", "touch"))
    except RuntimeError as error:  # virtual machines exist that it does not support
        raise Skip(f"compute-sanitizer does not run here: {error}") from error
    # PyTorch's allocator hands out pieces of large blocks; without it the sanitizer sees where each tensor ends.
    environment = run.environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}

    def words(tool: str, backend: str) -> Callable[[Journal], tuple[str, ...]]:
        # PyTorch asks the driver for what it may not have, and handles the refusal.
        check = (program, "--tool", tool, "--error-exitcode", str(SANITIZER_ERRORS), "--target-processes", "all",
                 *(("--report-api-errors", "no") if tool == "memcheck" else ()))  # fmt: skip
        chosen = (*SANITIZED[:-1], f"{SANITIZED[-1]} and {backend}", "--kernels=gpu")
        plugin = ("-p", "benchmarks.gpu.pytest_journal", "-p", "no:cacheprovider")
        return lambda journal: (*check, *module("pytest", *plugin, "--journal", journal.path, *chosen))

    workers = {
        f"{tool} {backend}": Worker(words(tool, backend), WORK / "sanitizer" / f"{tool}-{backend}", environment,
                                    LONG_PATIENCE, (0, SANITIZER_ERRORS))
        for tool in SANITIZER_TOOLS for backend in backends
    }  # fmt: skip
    finished = drive(list(workers.values()), run.time_left, run.tick)
    lines = [line for name, worker in workers.items() for line in sanitized(name, worker)]
    return judged(lines, finished, "tests under compute-sanitizer")


def can(run: Run, backend: str) -> bool:
    try:
        run.need(backend)
    except Skip:
        return False
    return True


def sanitized(name: str, worker: Worker) -> list[Line]:
    """The tests that ran under one tool, and the tool's own verdict: one that reports no summary has shown nothing."""
    lines = [{**line, "item": f"{name}: {line['item']}"} for line in worker.journal.read().ended.values()]
    summary = [
        line for line in worker.log.read_text(encoding="utf-8", errors="replace").splitlines() if "SUMMARY" in line
    ]
    if worker.process.status() not in worker.done:  # stopped, or noted as failed
        return lines
    clean = bool(summary) and all(" 0 errors" in line or " 0 hazards" in line for line in summary)
    told = "\n".join(summary) if summary else f"no summary:\n{runner.tail(worker.log)}"
    return [*lines, {"item": name, "outcome": "passed" if clean else "failed", "told": told}]
