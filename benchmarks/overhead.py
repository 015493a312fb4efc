"""What a call costs beyond its kernel: overhead, first call, import, peak memory."""

import statistics
import subprocess
import sys
from typing import Any

import torch

from benchmarks.compare_worker import one_entry_calls
from fastkm._runtime import dispatch
from fastkm.testing.peak import peak_of_step
from fastkm.testing.presets import PRESETS
from fastkm.testing.timing import time_in_turn

PROCESSES = 7
PEAK_BATCH = 64
OVERHEAD = (
    "a public function on B = T = K = C = Q = 1 less the registered operator it calls, on the same tensors: "
    "checks, dispatch and wrapping, while the operator's own time (PyTorch's dispatcher, outputs, kernel) is the rest"
)

IMPORT = """
import time, torch
begin = time.perf_counter()
import fastkm
print(1e3 * (time.perf_counter() - begin))
"""
FIRST_CALL = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
import fastkm
state = fastkm.MemoryState(torch.randn(16, 32, 100), torch.eye(32).repeat(16, 1, 1))
values, times = torch.randn(16, 32, 100), []
for _ in range(31):
    begin = time.perf_counter()
    fastkm.write(state, values, 1.0, 1.0)
    times.append(1e3 * (time.perf_counter() - begin))
print(times[0], sorted(times[1:])[15])
"""


def run_in_fresh_processes(code: str) -> list[list[float]]:
    """The numbers that ``code`` prints in each process; the first process, which fills the disk cache, is left out."""
    command = [sys.executable, "-c", code, str(torch.get_num_threads())]
    lines = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(PROCESSES + 1)]
    return [[float(number) for number in line.split()] for line in lines[1:]]


def overheads() -> list[dict[str, Any]]:
    """One record for every operation and way to give its numbers: as floats, as in the README, or as tensors."""
    calls = one_entry_calls()
    timings = time_in_turn({f"{name}, {given}": call for (name, given), call in calls.items()}, seconds=2.0)
    microseconds = {key: 1e6 * timings[f"{key[0]}, {key[1]}"].median for key in calls}
    return [
        {"operation": name, "given": given, "call": whole, "operator": microseconds[name, "operator"]}
        for (name, given), whole in microseconds.items()
        if given != "operator"
    ]


def measure() -> dict[str, Any]:
    """Without the native kernels, only what does not need them."""
    imports = [milliseconds for (milliseconds,) in run_in_fresh_processes(IMPORT)]
    first, steady = zip(*run_in_fresh_processes(FIRST_CALL), strict=True)
    backends = [name for name in ("native", "reference") if dispatch.why_not("write", name) is None]
    return {
        "import_ms": {"median": statistics.median(imports), "all": imports},
        "first_call_ms": {"first": statistics.median(first), "steady": statistics.median(steady)},
        "overhead_us": overheads() if "native" in backends else [],
        "overhead_is": OVERHEAD,
        "peak_bytes": {name: peak_of_step(PRESETS["M"], PEAK_BATCH, name) for name in backends},
        "peak_of": f"forward and backward of a write, preset M, B = {PEAK_BATCH}",
    }
