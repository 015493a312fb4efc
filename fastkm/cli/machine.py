"""What a result was measured on."""

import os
import platform
import sys
from pathlib import Path

import torch

import fastkm
from fastkm._runtime import schema


def instruction_level() -> str | None:
    """The instruction set the native kernels run with; ``None`` without them."""
    if schema.unavailable is not None:
        return None
    built = schema.build_facts()["instruction levels"].split(", ")
    level = torch.ops.fastkm.select_cpu_level(len(built) - 1)
    return f"{level} ({built[level]})"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def machine() -> dict[str, object]:
    return {
        "fastkm": fastkm.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction level": instruction_level() or "none: the native kernels are not loaded",
    }
