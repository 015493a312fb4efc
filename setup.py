"""Builds the C++ extension, when there is a compiler to build it with, and its CUDA kernels, when there is nvcc.

Three variables steer the build: FASTKM_NO_EXT=1 leaves the extension out, CXX names the compiler, and FASTKM_CUDA says
whether the CUDA kernels are built: "auto" (the default) where a toolkit is found, "1" always, "0" never. The toolkit
decides, not a visible GPU nor the build of torch. With no compiler the package installs without the extension and the
reference backend serves; a compile error stops the installation.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup

STABLE_ABI_TORCH = "0x020a000000000000"  # torch 2.10: the oldest release the built extension loads with
PYTHON_TAG = "cp310"  # the oldest Python; the extension itself uses no Python API
SOURCES = sorted(glob("csrc/**/*.cpp", recursive=True))
CUDA_SOURCES = sorted(glob("csrc/**/*.cu", recursive=True))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
CUDA_HEADERS = [path for path in HEADERS if not path.startswith(("csrc/cpu/", "csrc/bindings/"))]
CUDA_ARCHITECTURES = (80, 90, 100)  # compute capability × 10; devices after the last compile its PTX


def find_compiler() -> str | None:
    """CXX if it is set, else the compiler this Python was built with, else g++ or c++; ``None`` if there is none."""
    named = os.environ.get("CXX")
    for command in [named] if named else [sysconfig.get_config_var("CXX"), "g++", "c++"]:
        if command and shutil.which(shlex.split(command)[0]):
            return command
    return None


def find_nvcc() -> str | None:
    """What FASTKM_CUDA asks for: the CUDA compiler, or ``None`` to build without CUDA."""
    wanted = os.environ.get("FASTKM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"fastkm: FASTKM_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes if home), os.environ["PATH"]]))
    if nvcc is None and wanted == "1":
        raise SystemExit("fastkm: FASTKM_CUDA=1 but there is no nvcc; put it on PATH or set CUDA_HOME")
    print(f"fastkm: {f'CUDA kernels with {nvcc}' if nvcc else 'no nvcc found, building without CUDA kernels'}")
    return nvcc


def compile_cuda(nvcc: str, compiler: str, folder: Path) -> list[str]:
    """Objects of the CUDA kernels, which know nothing of torch; only what is out of date is compiled."""
    headers = max(os.path.getmtime(path) for path in [__file__, *CUDA_HEADERS])
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
    targets += [f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}"]

    def compiled(source: str) -> str:
        made = (folder / source).with_suffix(".o")
        made.parent.mkdir(parents=True, exist_ok=True)
        if not made.exists() or made.stat().st_mtime < max(headers, os.path.getmtime(source)):
            flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-ccbin", shlex.split(compiler)[0]]
            command = [nvcc, "-Icsrc", *flags, *targets, "-c", source, "-o", str(made)]
            print(shlex.join(command), flush=True)
            subprocess.run(command, check=True)
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, CUDA_SOURCES))


def cuda_libraries(nvcc: str) -> list[str]:
    """Folders that hold the CUDA runtime, as nvcc itself would name them to the linker."""
    told = subprocess.run([nvcc, "-dryrun", "-o", "none", "none.o"], capture_output=True, text=True).stderr
    return re.findall(r'"-L([^"]+)"', told)


def extension() -> dict:
    if os.environ.get("FASTKM_NO_EXT") == "1":
        print("fastkm: FASTKM_NO_EXT=1, installing without the C++ extension")
        return {}
    compiler = find_compiler()
    if compiler is None:
        missing = os.environ.get("CXX", "g++")
        print(f"fastkm: no C++ compiler ({missing} not found), installing without the C++ extension")
        return {}
    if compiler != sysconfig.get_config_var("CXX"):
        os.environ["CXX"] = compiler
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    macros = [("TORCH_TARGET_VERSION", STABLE_ABI_TORCH)]
    nvcc = find_nvcc() if CUDA_SOURCES else None
    linked = {}
    if nvcc:
        architectures = ",".join(map(str, CUDA_ARCHITECTURES))
        macros += [("FASTKM_WITH_CUDA", None), ("FASTKM_CUDA_ARCHITECTURES", architectures)]
        linked = {"library_dirs": cuda_libraries(nvcc), "libraries": ["cudart_static", "rt", "dl", "pthread"]}

    class Build(BuildExtension):
        def build_extensions(self):
            if nvcc:
                self.extensions[0].extra_objects = compile_cuda(nvcc, compiler, Path("build/cuda"))
            super().build_extensions()

    return {
        "ext_modules": [
            CppExtension(
                "fastkm._C",
                SOURCES,
                include_dirs=[str(Path(__file__).resolve().parent / "csrc")],  # ninja compiles in another folder
                depends=[*HEADERS, *CUDA_SOURCES],
                define_macros=macros,
                **linked,
                extra_compile_args=["-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall"],
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(**extension())
