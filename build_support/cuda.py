"""The CUDA toolkit: whether it is used, for which devices, and how it is called."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from build_support.compiler import BuildError, Compiler

ARCHITECTURES = (80, 90, 100)  # compute capability × 10; devices after the last compile its PTX
LEAST_ARCHITECTURE = 80  # the kernels multiply with TF32 tensor cores
FIRST_RELEASE = {90: "11.8", 100: "12.8"}  # of CUDA, that compiles for an architecture
CHANGES_RESULTS = re.compile(r"\S*(fast|ftz|prec-div|prec-sqrt|fmad)\S*")
FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    release: str  # "13.0"
    architectures: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"cu{self.release.replace('.', '')}"


def find_nvcc() -> str | None:
    """What FASTKM_CUDA asks for: the CUDA compiler, or ``None`` to build without CUDA."""
    wanted = os.environ.get("FASTKM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise BuildError(f"FASTKM_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", "")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None and wanted == "1":
        raise BuildError("FASTKM_CUDA=1 but there is no nvcc; put it on PATH or set CUDA_HOME")
    print(f"fastkm: {f'CUDA kernels with {nvcc}' if nvcc else 'no nvcc found, building without CUDA kernels'}")
    return nvcc


def find_toolkit() -> Toolkit | None:
    """The toolkit with its release and the architectures to build, or ``None`` to build without CUDA."""
    wanted = wanted_architectures()
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    check_environment()
    architectures = possible_architectures(nvcc, wanted)
    told = re.search(r"release (\d+\.\d+)", ask(nvcc, "--version"))
    if told is None:
        raise BuildError(f"{nvcc} --version names no release of CUDA; FASTKM_CUDA=0 builds without the CUDA kernels")
    return Toolkit(nvcc, told[1], architectures)


def wanted_architectures() -> tuple[int, ...]:
    """The compute capabilities × 10 that FASTKM_CUDA_ARCH names, in order; all of them by default."""
    named = os.environ.get("FASTKM_CUDA_ARCH", "")
    if not named:
        return ARCHITECTURES
    words = [word.strip() for word in named.split(",")]
    if not all(re.fullmatch("[0-9]{2,3}", word) and int(word) >= LEAST_ARCHITECTURE for word in words):
        raise BuildError(
            "FASTKM_CUDA_ARCH must be compute capabilities × 10 with commas between them, each at least "
            f"{LEAST_ARCHITECTURE}, as in 90 or 80,90; got {named!r}"
        )
    return tuple(sorted(set(map(int, words))))


def possible_architectures(nvcc: str, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the wanted architectures that the toolkit compiles for. What is left out is said; named ones must be."""
    known = {int(number) for number in re.findall(r"compute_(\d+)", ask(nvcc, "--list-gpu-arch"))}
    missing = [architecture for architecture in wanted if architecture not in known]
    possible = tuple(architecture for architecture in wanted if architecture in known)
    if not missing:
        return possible
    needs = (f"sm_{arch} needs CUDA {FIRST_RELEASE.get(arch, 'of another release')}" for arch in missing)
    words = f"{nvcc} does not compile for every device: {', '.join(needs)}"
    if not possible or os.environ.get("FASTKM_CUDA_ARCH"):
        raise BuildError(f"{words}. FASTKM_CUDA=0 builds without the CUDA kernels")
    print(f"fastkm: {words}; building sm_{', sm_'.join(map(str, possible))}, and PTX that later devices compile")
    return possible


def ask(nvcc: str, *question: str) -> str:
    return subprocess.run([nvcc, *question], capture_output=True, text=True).stdout


def compile_command(toolkit: Toolkit, compiler: Compiler) -> list[str]:
    """How a CUDA source is compiled, without its name. The kernels know nothing of torch."""
    last = toolkit.architectures[-1]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in toolkit.architectures]
    targets += [f"-gencode=arch=compute_{last},code=compute_{last}"]
    host = [f"-Xcompiler={flag}" for flag in compiler.command[len(compiler.launcher) + 1 :]]
    return [*compiler.launcher, toolkit.nvcc, "-Icsrc", *FLAGS, "-ccbin", compiler.program, *host, *targets]


def check_environment() -> None:
    """Refuse flags that nvcc reads from the environment by itself and that change results."""
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        if found := CHANGES_RESULTS.search(os.environ.get(name, "")):
            raise BuildError(f"{name} holds {found[0]!r}, which changes results; take it out")


def libraries(nvcc: str) -> list[str]:
    """How the CUDA runtime is linked; its folders are those that nvcc itself names to the linker."""
    told = subprocess.run([nvcc, "-dryrun", "-o", "none", "none.o"], capture_output=True, text=True).stderr
    return [
        *(f"-L{folder}" for folder in re.findall(r'"-L([^"]+)"', told)),
        "-lcudart_static",
        "-lrt",
        "-ldl",
        "-lpthread",
    ]
