"""A GPU simulated on the CPU, for the processes of `make gpu`: ``python -m simulated_gpu -m MODULE ...`` runs MODULE.

``torch.cuda`` answers what the command asks, tensors stay on the CPU, the native backend runs its CPU kernels and the
Triton kernels run in Triton's interpreter. Presets and batches are small, cases are few. SIMULATED_FAULT, as in
"hang write triton", plants a fault in the verification of one candidate: exit, hang, lost or wrong.
"""

import os
import runpy
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from fastkm.testing.operations import Case

CASES = (Case("write"), Case("write", True), Case("kl_memory"))
SMALL = (4, 5, 2)  # K, C, T of every preset


class Cuda:
    """What the command asks of ``torch.cuda``; each name exists in the real one."""

    lost = False

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self): ...

        def synchronize(self): ...

        def elapsed_time(self, end):
            assert isinstance(end, Cuda.Event)
            return 0.5  # ms

    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Cuda.Stream)

    class CUDAGraph:
        def replay(self): ...

    @staticmethod
    def get_device_properties(_):
        return SimpleNamespace(name="simulated", major=9, minor=0, total_memory=2**32, L2_cache_size=1024)

    @staticmethod
    def synchronize():
        if Cuda.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    current_stream = staticmethod(Stream)
    stream = graph = staticmethod(lambda _: nullcontext())
    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    empty_cache = staticmethod(lambda: None)


def install() -> None:
    for name in (name for name in vars(Cuda) if not name.startswith("__") and name != "lost"):
        assert hasattr(torch.cuda, name)
        setattr(torch.cuda, name, getattr(Cuda, name))
    to = torch.Tensor.to
    torch.Tensor.to = lambda x, *given, **named: to(x, *("cpu" if g == "cuda" else g for g in given), **named)
    torch.compile = lambda function: function  # minutes, and nothing of the command's
    if os.environ.get("TRITON_INTERPRET"):
        from gpu.interpreter import correct

        correct()
    from benchmarks.gpu import candidates, probe, timing
    from fastkm._runtime import dispatch
    from fastkm.testing import episodes
    from fastkm.testing.presets import PRESETS, Preset

    candidates.CASES = CASES
    probe.DEVICE, timing.COPIED, timing.LEAST_ROUNDS = "cpu", 1024, 2
    build = episodes.build_episode
    episodes.build_episode = lambda images, preset, batch, *_: build(images, preset, min(batch, 2), 3, 2)
    PRESETS.update({name: Preset(name, *SMALL) for name in PRESETS})
    for table in dispatch.CAPABILITIES.values():
        for backend in {"native", "triton"} & table.keys():
            table[backend] = dispatch.Capability({"cpu": dispatch.FLOAT32}, table[backend].gradients)
    if fault := os.environ.get("SIMULATED_FAULT"):
        plant(*fault.split(" ", 1))


def plant(fault: str, where: str) -> None:
    from benchmarks.gpu.candidates import Judge, Verdict

    verdict = Judge.verdict

    def faulty(self, name, call):
        if f"{self.case} {name}" != where:
            return verdict(self, name, call)
        if fault == "exit":
            os._exit(9)
        if fault == "hang":
            time.sleep(1e6)
        if fault == "lost":
            Cuda.lost = True
            torch.cuda.synchronize()
        return Verdict(False, 1.0, 0.1, "mean is off")

    Judge.verdict = faulty


if __name__ == "__main__":
    sys.argv = sys.argv[2:]  # from -m MODULE on
    install()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
