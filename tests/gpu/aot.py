"""Ahead-of-time compilation of Triton kernels for GPUs that are not there, and what their machine code shows.

The launches of a call are recorded rather than run, so kernels, signatures and block sizes are those of the launchers
themselves. Needs a process in which ``TRITON_INTERPRET`` is not set.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.backends.__file__).parent / "nvidia" / "bin"
REGISTERS = 65536  # of a multiprocessor, on all three NVIDIA targets
THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048}
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # KiB of a multiprocessor; a block costs one more


class Launch(NamedTuple):
    """A kernel as a launcher would have launched it."""

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict
    attributes: dict
    options: Any
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


class Built(NamedTuple):
    """What the machine code of one kernel for one target shows; instruction counts are of its text, not of a run."""

    registers: int
    shared: int  # bytes
    spills: int  # loads and stores of local memory; bytes of scratch on AMD
    occupancy: float  # resident threads over the most there can be; 0 where not known
    tensor_cores: int
    wide_loads: int  # of 128 bits from global memory
    loads: int
    instructions: int
    float_atomics: int


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget, device: int):
        self.target, self.device = target, device

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


def record(call: Callable[[], object], target: str) -> list[Launch]:
    """The launches of ``call``, each different one once, as they would be made on ``target``."""
    launches: dict[str, Launch] = {}
    grids = []
    compile_, run, before, hip = JITFunction._do_compile, JITFunction.run, driver._active, torch.version.hip
    torch.version.hip = "6" if target.startswith("gfx") else None
    driver.set_active(_Driver(TARGETS[target], list(TARGETS).index(target)))

    def remember_grid(self, *arguments, grid, warmup, **options):
        grids.append(grid)
        return run(self, *arguments, grid=grid, warmup=warmup, **options)

    def remember(self, key, signature, device, constexprs, options, attributes, warmup):
        launch = Launch(self, signature, constexprs, attributes, options, grids[-1])
        launches.setdefault(f"{launch.name} {key}", launch)

    JITFunction._do_compile, JITFunction.run = remember, remember_grid
    try:
        call()
    finally:
        JITFunction._do_compile, JITFunction.run = compile_, run
        driver._active, torch.version.hip = before, hip
    return list(launches.values())


def build(launch: Launch, target: str) -> Built:
    source = ASTSource(
        fn=launch.kernel, signature=launch.signature, constexprs=launch.constexprs, attrs=launch.attributes
    )
    compiled = triton.compile(source, target=TARGETS[target], options=launch.options.__dict__)
    return _amd(compiled) if target.startswith("gfx") else _nvidia(compiled, target, launch.options.num_warps)


def _nvidia(compiled, target: str, warps: int) -> Built:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def tool(name, *options):
            return subprocess.run(
                [TOOLS / name, *options, file.name], capture_output=True, text=True, check=True
            ).stdout

        usage, text = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    pattern = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)"
    instructions = re.findall(pattern, text, re.M)
    count = Counter(name.partition(".")[0] for name in instructions)
    shared, threads = compiled.metadata.shared, 32 * warps
    blocks = min(
        REGISTERS // (-(-registers // 8) * 8 * threads),
        THREADS[target] // threads,
        SHARED[target] * 1024 // (shared + 1024),
    )
    return Built(
        registers=registers,
        shared=shared,
        spills=count["LDL"] + count["STL"],
        occupancy=blocks * threads / THREADS[target],
        tensor_cores=sum(n for name, n in count.items() if name.endswith("MMA") and name != "FMMA"),
        wide_loads=sum(name.startswith(("LDG", "LDGSTS")) and ".128" in name for name in instructions),
        loads=count["LDG"] + count["LDGSTS"],
        instructions=len(instructions),
        float_atomics=sum(
            name.startswith(("RED", "ATOM")) and any(f".{kind}" in name for kind in ("F16", "F32", "F64", "BF16"))
            for name in instructions
        ),
    )


def _amd(compiled) -> Built:
    text = compiled.asm["amdgcn"]

    def value(name):
        return int(re.search(rf"{name}:?\s+(\d+)", text)[1])

    return Built(
        registers=value(r"\.vgpr_count"),
        shared=compiled.metadata.shared,
        spills=value(r"\.vgpr_spill_count"),
        occupancy=0.0,
        tensor_cores=text.count("v_mfma"),
        wide_loads=text.count("global_load_dwordx4") + text.count("buffer_load_dwordx4"),
        loads=len(re.findall(r"(?:global|buffer)_load_", text)),
        instructions=len(re.findall(r"^\s+(?:v|s|ds|global|buffer|flat)_\w+", text, re.M)),
        float_atomics=len(re.findall(r"(?:global|buffer|flat)_atomic_\w*_f\d+", text)),
    )
