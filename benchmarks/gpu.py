"""Everything that only a machine with a GPU can show, in one command: `make gpu`.

Builds the CUDA kernels, runs every test of the GPU kernels on the device, looks for errors with compute-sanitizer, and
times both backends against PyTorch, each verified first. Writes gpu.json and gpu.md. Without a GPU the steps that need
one are listed with what is missing, and everything else is done.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from benchmarks.forms import LOOP
from fastkm import MemoryState
from fastkm._runtime import dispatch, schema
from fastkm.cli.console import markdown_table, show_table
from fastkm.cli.machine import machine
from fastkm.testing import roofline
from fastkm.testing.definitions import Result
from fastkm.testing.episodes import Episode, build_episode
from fastkm.testing.images import load_images
from fastkm.testing.operations import GRADIENT_CASES, KERNEL_OPERATIONS, OPERATIONS, Case, computation
from fastkm.testing.presets import LARGE, PRESETS, Preset
from fastkm.testing.verification import (
    OTHER_FORM,
    compare,
    definition_error,
    reference_errors,
    relative_errors,
    verify,
)

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = "needs a GPU that torch can use; there is none here"
QUERIES = 32
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = ("tests/gpu", "-k", "memory_in_the_batch")  # few and small: the sanitizer is 10 to 100 times slower
COMPILED, BLOCK_FORM = "torch.compile", "block form"
KERNELS = ("native", "triton")
COMPILED_PRESETS = ("S", "M")  # a compiler unrolls the reference's loop over patterns, which takes minutes beyond
LARGE_BATCH = 64  # most memories at the large presets: the definition in float64 has to fit too
# Bits that a product with codes keeps of each factor, on a unit that truncates.
SIGNIFICANT = {"tf32x3": 20, "tf32": 10}
TIMED = (*map(Case, KERNEL_OPERATIONS), *GRADIENT_CASES)
DEVICE = "cuda"
MODES = ("cold", "hot", "graph cold", "graph hot")
HEADERS = ("operation", "preset", "B", "candidate", "max error", *(f"{mode} µs" for mode in MODES), "% of the bound")

Step = dict[str, Any]


class Skip(Exception):
    """A step that cannot be done here, and why."""


# ---- steps ---------------------------------------------------------------------------------------------------------


def command(*words: str, **environment: str) -> str:
    """The last lines of a command that has to succeed."""
    done = subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{said}")
    return said


def pytest(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", "pytest", *arguments


def build() -> str:
    """The package as it was set up, or built again with CUDA where that has none though there is a compiler for it."""
    if not schema.has_cuda:
        if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
            raise Skip("needs nvcc; there is none here")
        pip = ("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", ".")
        command(sys.executable, *pip, FASTKM_CUDA="1")
        raise RuntimeError("the CUDA kernels are built only now, and this process has none: run it again")
    # In a fresh process, as it will be loaded.
    return command(sys.executable, "-c", "from fastkm.cli.doctor import cuda; print(cuda())")


def machine_code() -> str:
    return command(*pytest("tests/test_cuda_budgets.py"))


def tests() -> str:
    need_gpu()
    return command(*pytest("tests/gpu", "--kernels=gpu"))


def sanitize() -> str:
    need_gpu()
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        raise Skip("needs compute-sanitizer of the CUDA toolkit; there is none here")
    said = []
    for tool in SANITIZER_TOOLS:
        check = (sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all")
        # PyTorch's allocator hands out pieces of large blocks; without it the sanitizer sees where each tensor ends.
        command(*check, *pytest(*SANITIZED, "--kernels=gpu"), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        said.append(f"{tool}: no errors")
    return "; ".join(said)


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise Skip(NO_GPU)


def attempt(name: str, work: Callable[[], str]) -> Step:
    print(f"{name} ...", flush=True)
    begin = time.perf_counter()
    try:
        step = {"status": "passed", "told": work()}
    except Skip as why:
        step = {"status": "skipped", "told": str(why)}
    except Exception as error:  # the other steps still run, and the report says what happened
        step = {"status": "failed", "told": f"{type(error).__name__}: {error}"}
    step = {"step": name, **step, "seconds": round(time.perf_counter() - begin, 1)}
    print(f"{name} {step['status']}: {step['told']}", flush=True)
    return step


# ---- timing --------------------------------------------------------------------------------------------------------


def candidates(case: Case, episode: Episode) -> dict[str, Callable[[], Result]]:
    """Every computation of the case: each backend by its name, and by its name and a precision that is not exact."""
    form, known = computation(case), dispatch.CAPABILITIES[case.operation]
    ways: dict[str, Callable[[], Result]] = {name: partial(form.run, episode, name) for name in known}
    if OPERATIONS[case.operation].takes_precision:
        for name in (name for name in KERNELS if name in known):
            for precision in SIGNIFICANT:
                ways[f"{name} {precision}"] = partial(form.run, episode, name, precision=precision)
    if episode.prior.mean.shape[1] <= max(PRESETS[name].K for name in COMPILED_PRESETS):
        torch._dynamo.reset()  # or the ninth call compiled here would silently run uncompiled
        ways[COMPILED] = torch.compile(lambda: form.run(episode, "reference"))
    if case.operation == "write":
        ways[BLOCK_FORM] = partial(form.other, episode)  # in Gram space
    if form.loop is not None:
        ways[LOOP] = partial(form.definition, episode)
    return ways


def precision_of(candidate: str) -> str:
    precision = candidate.rpartition(" ")[2]
    return precision if precision in SIGNIFICANT else "ieee"


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def rounding_errors(case: Case, episode: Episode, bits: int, truth: Result) -> dict[str, float]:
    """The errors of rounding once everything that products with codes multiply: memories, weights, codes."""

    def coarse(state: MemoryState) -> MemoryState:
        return state._replace(mean=rounded(state.mean, bits))

    names = ("weights", "values", "queries")
    given = {name: rounded(getattr(episode, name), bits) for name in names}
    given |= {name: coarse(getattr(episode, name)) for name in ("prior", "written")}
    return relative_errors(computation(case).run(episode._replace(**given), "reference"), truth)


def verified(case: Case, episode: Episode) -> dict[str, tuple[Callable[[], Result], float, str]]:
    """Candidate -> call, error against float64, and why it must not be timed, empty if it may."""
    verdicts, form = verify(case, episode), computation(case)
    truth = form.definition(episode.to(torch.float64))
    found = {}
    for name, call in candidates(case, episode).items():
        if name not in verdicts:
            try:
                if name == LOOP:
                    verdicts[name] = definition_error(case, episode)
                else:
                    reference = form.run(episode, "reference")
                    rounding = reference_errors(case, episode, reference, truth)
                    if bits := SIGNIFICANT.get(precision_of(name)):
                        once = rounding_errors(case, episode, bits, truth)
                        rounding = {field: max(e, once[field]) + 2.0**-bits for field, e in rounding.items()}
                    verdicts[name] = compare(call(), truth, rounding, OTHER_FORM)
            except Exception as error:
                found[name] = (call, float("nan"), f"{type(error).__name__}: {error}")
                continue
        verdict = verdicts[name]
        found[name] = (call, verdict.error, "" if verdict.ok else verdict.note)
    return found


def time_on_device(call: Callable[[], object], rounds: int, flush: torch.Tensor | None) -> dict[str, float]:
    """Seconds a call by CUDA events, median and quartiles; writing ``flush`` empties L2 before each call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        if flush is not None:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper, "rounds": rounds}


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(case: Case, preset: Preset, episode: Episode, rounds: int, flush: torch.Tensor) -> list[dict[str, Any]]:
    records, batch = [], len(episode.values)
    for name, (call, error, refused) in verified(case, episode).items():
        record: dict[str, Any] = {**case._asdict(), "preset": preset.name, "batch": batch}
        bounds = [roofline.bound(o.name, preset, batch, QUERIES, precision_of(name)) for o in case.operators]
        record |= {"candidate": name, "precision": precision_of(name), "error": error, "refused": refused}
        record |= {"bound_seconds": sum(bound.seconds for bound in bounds), "seconds": {}}
        if not refused:
            seconds = record["seconds"]
            seconds["cold"] = time_on_device(call, rounds, flush)
            seconds["hot"] = time_on_device(call, rounds, None)
            try:
                replay = captured(call)
                seconds["graph cold"] = time_on_device(replay, rounds, flush)
                seconds["graph hot"] = time_on_device(replay, rounds, None)
            except Exception as problem:  # a call that waits for the host cannot be captured
                record["no_graph"] = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
        records.append(record)
        print("  ".join(row(record)), flush=True)
    return records


def label(record: dict[str, Any]) -> str:
    return str(Case(record["operation"], record["gradient"]))


def row(record: dict[str, Any]) -> tuple[str, ...]:
    where = (label(record), record["preset"], str(record["batch"]), record["candidate"])
    if record["refused"]:
        return (*where, f"{record['error']:.1e}", *["–"] * len(MODES), "not timed: " + record["refused"][:60])
    times = {mode: timing["median"] for mode, timing in record["seconds"].items()}
    cells = (f"{1e6 * times[mode]:.1f}" if mode in times else "–" for mode in MODES)
    best = min(times[mode] for mode in ("cold", "graph cold") if mode in times)
    return (*where, f"{record['error']:.1e}", *cells, f"{record['bound_seconds'] / best:.0%}")


def benchmark(options: argparse.Namespace, records: list[dict[str, Any]]) -> str:
    need_gpu()
    images = load_images()
    flush = torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device=DEVICE)
    problems = []
    for preset in (PRESETS[name] for name in options.presets):
        for batch in sorted({min(batch, LARGE_BATCH) if preset.name in LARGE else batch for batch in options.batch}):
            episode = build_episode(images, preset, batch, QUERIES, num_iters=10).to(torch.float32)
            episode = tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, episode)
            for case in TIMED:
                try:
                    records += measure(case, preset, episode, options.rounds, flush)
                except Exception as error:  # too little memory, for example; the others are still timed
                    problems.append(f"{case} {preset.name} B = {batch}: {type(error).__name__}: {error}")
                    print(problems[-1], flush=True)
                    torch.cuda.empty_cache()
    wrong = [f"{label(r)} {r['preset']} {r['candidate']}" for r in records
             if r["refused"] and r["candidate"].startswith(KERNELS)]  # fmt: skip
    if wrong:
        problems.append(f"not timed as they failed their check: {', '.join(wrong)}")
    if problems:
        raise RuntimeError("; ".join(problems))
    return f"{len(records)} candidates"


# ---- the report ----------------------------------------------------------------------------------------------------


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), metavar="NAME")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 64, 1024], help="memories")
    parser.add_argument("--rounds", type=int, default=30, help="of each timing")
    parser.add_argument("--output", default="results", metavar="FOLDER")
    options = parser.parse_args(arguments)

    records: list[dict[str, Any]] = []
    steps = [
        attempt("build", build),
        attempt("machine code", machine_code),
        attempt("tests on the device", tests),
        attempt("compute-sanitizer", sanitize),
        attempt("benchmark", partial(benchmark, options, records)),
    ]
    bounds = {batch: roofline.bound_table(batch, QUERIES) for batch in options.batch}
    about = {**machine(), "device": device(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    rows = [row(record) for record in records]
    done = [(step["step"], step["status"], step["told"].splitlines()[-1]) for step in steps]
    show_table("make gpu", ("step", "status", ""), done)

    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    bound = {str(batch): {"title": title, "headers": headers, "rows": lines}
             for batch, (title, headers, lines) in bounds.items()}  # fmt: skip
    report = {"machine": about, "steps": steps, "records": records, "bound": bound}
    (output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    measured = markdown_table(HEADERS, rows) if rows else "Nothing was timed."
    bounds_told = (f"{title}\n\n{markdown_table(headers, lines)}" for title, headers, lines in bounds.values())
    parts = (f"Device: {about['device']}", markdown_table(("step", "status", ""), done), measured, *bounds_told)
    (output / "gpu.md").write_text("\n\n".join(parts) + "\n")
    print(f"Wrote {output}/gpu.json and gpu.md")
    return 1 if any(step["status"] == "failed" for step in steps) else 0


if __name__ == "__main__":
    raise SystemExit(main())
