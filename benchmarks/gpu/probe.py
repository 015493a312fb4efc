"""What there is, as one line of JSON: ``python -m benchmarks.gpu.probe device``, ``package`` or ``touch``.

The command asks in a process of its own: it must not hold the device itself, and a library that was built a moment ago
is seen by new processes only.
"""

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DEVICE = "cuda"
LEAST_CAPABILITY = 80
PACKAGES = ("torch", "triton", "numpy", "setuptools", "ninja", "pytest", "hypothesis", "mlxtend", "rich")


def toolkit(name: str) -> str | None:
    """A program of the CUDA toolkit, which installs itself outside PATH; in the order of setup.py."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/{part}" for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def toolkit_version() -> int | None:
    """As CUDA counts, 13000 for 13.0."""
    nvcc = toolkit("nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    found = re.search(r"release (\d+)\.(\d+)", said)
    return 1000 * int(found[1]) + 10 * int(found[2]) if found else None


def driver_version() -> int | None:
    """The newest CUDA that the driver runs, as CUDA counts."""
    try:
        found = ctypes.c_int()
        return found.value if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found)) == 0 else None
    except OSError:
        return None


def nvidia_smi(*fields: str) -> list[str]:
    """The fields of the first device; empty where there is no nvidia-smi or no device."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return [field.strip() for field in lines[0].split(",")] if lines else []


def no_device() -> str:
    """Why torch can use no device."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # a driver refuses in many ways
        return str(error).splitlines()[0].partition(". ")[0]
    return "torch.cuda.is_available() is False"


def device() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "executable": sys.executable}
    found |= {name: installed(name) for name in PACKAGES}
    found |= {"torch": torch.__version__, "torch CUDA": torch.version.cuda}  # with the build, as in 2.11.0+cu130
    found |= {"nvcc": toolkit("nvcc"), "nvcc version": toolkit_version(), "driver": driver_version()}
    found |= {
        "compute-sanitizer": toolkit("compute-sanitizer"),
        "nvidia-smi": nvidia_smi("driver_version", "compute_mode"),
    }
    found |= {"cores": len(os.sched_getaffinity(0)), "device": "none"}
    if not torch.cuda.is_available():
        return found | {"no device": no_device()}
    properties = torch.cuda.get_device_properties(0)
    capability = 10 * properties.major + properties.minor
    found |= {"device": properties.name, "devices": torch.cuda.device_count(), "capability": capability}
    return found | {"GiB": round(properties.total_memory / 2**30, 1), "L2 bytes": properties.L2_cache_size}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package() -> dict[str, Any]:
    import fastkm
    from fastkm._runtime import schema
    from fastkm.cli.machine import machine

    library = Path(fastkm.__file__).with_name("_C.abi3.so")
    return {
        **machine(),
        "package": str(Path(fastkm.__file__).parent),
        "library": str(library) if library.exists() else None,
        "unavailable": schema.unavailable,
        "architectures": schema.cuda_architectures(),
    }


def device_is_lost() -> bool:
    """Whether every further call of this process fails, as after an illegal access."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def touch() -> float:
    """One kernel of PyTorch's."""
    import torch

    return torch.ones(1).to(DEVICE).add_(1).item()


if __name__ == "__main__":
    print("\n" + json.dumps({"device": device, "package": package, "touch": touch}[sys.argv[1]]()))
