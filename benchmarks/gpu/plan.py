"""The steps in their order: those that tell most come first, so that a run cut short has told most."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.forms import LOOP
from benchmarks.gpu import steps
from benchmarks.gpu.candidates import BLOCK_FORM, COMPILED, KERNELS, REFERENCE
from benchmarks.gpu.steps import LONG_PATIENCE, Outcome, Run

BUDGET = 480  # seconds of all steps
QUICK = (*KERNELS, REFERENCE, BLOCK_FORM)


class Step(NamedTuple):
    name: str
    work: Callable[[Run], Outcome]
    share: float  # of the budget that it may take at most
    expected: int  # seconds on 16 cores and one device: an estimate
    what: str


def timed(
    name: str, settings: str, kinds: tuple[str, ...], patience: float = steps.PATIENCE
) -> Callable[[Run], Outcome]:
    return partial(steps.timings, name=name, settings=settings.split(), kinds=kinds, patience=patience)


STEPS = (
    Step("machine", steps.machine, 0.1, 10, "Python, torch, the device, the CUDA toolkit"),
    Step("build", steps.build, 0.5, 75, "the kernels of this checkout, in place, for this device"),
    Step("smoke-native", partial(steps.smoke, backend="native"), 0.15, 20,
         "each operation and gradient at S, M, L against float64"),
    Step("smoke-triton", partial(steps.smoke, backend="triton"), 0.25, 50, "the same; Triton compiles its kernels"),
    Step("timings", timed("timings", "S:64 M:64 L:64", QUICK), 0.25, 80,
         "verified, then timed at S, M, L with 64 memories: kernels beside the reference"),
    Step("tests-native", partial(steps.device_tests, backend="native"), 0.2, 25, "all tests of the CUDA kernels"),
    Step("tests-triton", partial(steps.device_tests, backend="triton"), 0.25, 60, "all tests of the Triton kernels"),
    Step("sanitizer", steps.sanitize, 0.25, 60, "a few small tests under each tool of compute-sanitizer"),
    Step("machine-code", steps.machine_code, 0.1, 20, "registers, spills, wide loads in the library; needs no GPU"),
    Step("timings-batches", timed("batches", "S:1024 M:1024 L:1024 S:1 M:1 L:1", QUICK), 1, 120,
         "the same with 1024 memories and with one"),
    Step("timings-large", timed("large", "XL:64 LLM:64", QUICK), 1, 60, "XL and LLM"),
    Step("timings-pytorch", timed("pytorch", "S:64 M:64", (LOOP, COMPILED), LONG_PATIENCE), 1, 600,
         "the literal loop, and torch.compile, which unrolls it in minutes"),
)  # fmt: skip
