"""Read the machine code of the CUDA kernels from a built extension.

Nothing is compiled or run: ``cuobjdump`` extracts the code of one target from the library and ``nvdisasm`` prints it.
Both come with Triton's wheel.
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fastkm._runtime import schema

EXTENSION = Path(schema.__file__).parents[1] / "_C.abi3.so"
TARGETS = ("sm_80", "sm_90", "sm_100")  # of a build for all devices
THREADS = 256  # of a block, kThreads of csrc/cuda/linalg/workspace.cuh
CORES = {"0": "ieee", "1": "tensor"}  # the enum among the template arguments of kernels that multiply with codes

# Of one multiprocessor, by the CUDA programming guide; equal for compute capability 8.0, 9.0 and 10.0.
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
RESERVED = 1024  # bytes of shared memory that the system takes for each thread block

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.M)


class Code(NamedTuple):
    """One kernel for one target. Instructions are counted in its text, not in a run."""

    kernel: str
    registers: int  # of a thread
    spills: int  # loads and stores of local memory
    tensor_cores: int
    wide_loads: int  # of 128 bits, from global memory or a space known only at run time
    float_atomics: int
    instructions: int  # without the NOPs at the end


def tool(name: str) -> str | None:
    """Where cuobjdump or nvdisasm is."""
    spec = find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    beside = Path(folders[0]) / "backends" / "nvidia" / "bin" / name if folders else None
    return str(beside) if beside and beside.exists() else shutil.which(name)


def unavailable() -> str | None:
    """Why there is no machine code to look at; ``None`` if there is."""
    if not schema.has_cuda:
        return "the extension was built without CUDA kernels; they need nvcc"
    missing = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    return f"no {' and no '.join(missing)}; they come with Triton" if missing else None


def built() -> list[str]:
    """The targets that the extension holds machine code for."""
    return [f"sm_{architecture}" for architecture in schema.cuda_architectures()]


def occupancy(target: str, registers: int, threads: int, shared: int) -> float:
    """Resident warps over the most possible. A warp gets registers in units of 256, a block warps in units of 4."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = SHARED[target] // (-(-(shared + RESERVED) // 128) * 128)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps / WARPS


def name_of(symbol: str) -> str:
    """A kernel with its template arguments, from its mangled name: ``update_kernel<tensor, 128>``."""
    for found in re.finditer(r"\d+", symbol):  # a name follows its length
        for digits in (found[0][i:] for i in range(len(found[0]))):
            name = symbol[found.end() : found.end() + int(digits)]
            if len(name) == int(digits) and re.fullmatch(r"[a-z_]+_kernel", name):
                rest = symbol[found.end() + len(name) :]
                arguments = re.findall(r"L([a-zA-Z]|NS0_\d[A-Za-z]+E)(\d+)E", rest.partition("EEv")[0] + "E")
                words = [CORES[n] if len(kind) > 1 else n for kind, n in arguments]
                return f"{name}<{', '.join(words)}>" if words and rest.startswith("I") else name
    return symbol


def run(name: str, *options: object, folder: str = ".") -> str:
    """What cuobjdump or nvdisasm prints."""
    command = [str(tool(name)), *map(str, options)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@lru_cache
def kernels(target: str, library: Path = EXTENSION) -> list[Code]:
    """Every kernel of a library for one target."""
    with tempfile.TemporaryDirectory() as folder:
        run("cuobjdump", "-xelf", target + ".cubin", library.resolve(), folder=folder)
        return sorted(code for cubin in Path(folder).glob("*.cubin") for code in kernels_of(cubin))


def kernels_of(cubin: Path) -> list[Code]:
    usage = run("cuobjdump", "-res-usage", cubin)
    registers = dict(re.findall(r"Function (\S+):\s*\n\s*REG:(\d+)", usage))
    sections = re.split(r"^//-+ \.text\.(\S+) -+$", run("nvdisasm", "-c", cubin), flags=re.M)[1:]
    texts = dict(zip(sections[::2], sections[1::2], strict=True))
    return [code_of(symbol, int(count), texts[symbol]) for symbol, count in registers.items()]


def code_of(symbol: str, registers: int, text: str) -> Code:
    instructions = INSTRUCTION.findall(text)
    count = Counter(instruction.partition(".")[0] for instruction in instructions)
    return Code(
        name_of(symbol),
        registers,
        count["LDL"] + count["STL"],
        sum(n for name, n in count.items() if name.endswith("MMA")),
        sum(n.startswith(("LDG.", "LDGSTS.", "LD.")) and ".128" in n for n in instructions),
        sum(n.startswith(("RED", "ATOM")) and bool(re.search(r"\.(B?F16|F32|F64)", n)) for n in instructions),
        len(instructions) - count["NOP"],
    )
