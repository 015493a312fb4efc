"""What a call costs beyond its kernel: overhead, first call, import, peak memory."""

import statistics
import subprocess
import sys
from typing import Any

import torch
from timing import interleave

import fastkm
from fastkm import MemoryState
from fastkm._runtime import dispatch
from fastkm.testing.peak import peak_of_step
from fastkm.testing.presets import PRESETS

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


def fresh(code: str) -> list[list[float]]:
    """What a few lines print, in processes of their own; the first, which fills the disk cache, is left out."""
    command = [sys.executable, "-c", code, str(torch.get_num_threads())]
    told = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(PROCESSES + 1)]
    return [[float(number) for number in line.split()] for line in told[1:]]


def overheads() -> list[dict[str, Any]]:
    """One record for every operation and way to give its numbers: as floats, as in the README, or as tensors."""
    mean, cov, z = torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1)
    state, w, noise, ridge, run = MemoryState(mean, cov), torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1), {}
    operators = torch.ops.fastkm
    for given, one_noise, one_ridge in (("floats", 1.0, 1.0), ("tensors", noise, ridge)):
        run["update_posterior", given] = lambda n=one_noise: fastkm.update_posterior(state, w, z, n)
        run["write", given] = lambda n=one_noise, r=one_ridge: fastkm.write(state, z, n, r)
        run["read", given] = lambda r=one_ridge: fastkm.read(mean, z, r)
    run["logdet", "tensors"] = lambda: fastkm.matrix_normal.logdet(cov)
    run["update_posterior", "operator"] = lambda: operators.update_posterior.default(mean, cov, w, z, noise, None, 0)
    run["write", "operator"] = lambda: operators.write.default(mean, cov, z, noise, ridge, 1, False, None, 0)
    run["read", "operator"] = lambda: operators.read.default(mean, z, ridge, 1, False, 0)
    run["logdet", "operator"] = lambda: operators.logdet.default(cov)
    timings = interleave({f"{name}, {given}": call for (name, given), call in run.items()}, seconds=2.0)
    microseconds = {key: 1e6 * timings[f"{key[0]}, {key[1]}"].median for key in run}
    return [
        {"operation": name, "given": given, "call": whole, "operator": microseconds[name, "operator"]}
        for (name, given), whole in microseconds.items()
        if given != "operator"
    ]


def measure() -> dict[str, Any]:
    """Nothing that needs the native kernels where they are not there."""
    imports = [milliseconds for (milliseconds,) in fresh(IMPORT)]
    first, steady = zip(*fresh(FIRST_CALL), strict=True)
    backends = [name for name in ("native", "reference") if dispatch.why_not("write", name) is None]
    return {
        "import_ms": {"median": statistics.median(imports), "all": imports},
        "first_call_ms": {"first": statistics.median(first), "steady": statistics.median(steady)},
        "overhead_us": overheads() if "native" in backends else [],
        "overhead_is": OVERHEAD,
        "peak_bytes": {name: peak_of_step(PRESETS["M"], PEAK_BATCH, name) for name in backends},
        "peak_of": f"forward and backward of a write, preset M, B = {PEAK_BATCH}",
    }
