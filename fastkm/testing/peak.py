"""Peak memory of one training step, in a separate process: ``python -m fastkm.testing.peak BACKEND PRESET B``."""

import subprocess
import sys
from pathlib import Path

import torch

from fastkm import MemoryState, write
from fastkm.testing.presets import PRESETS, Preset

STATUS = Path("/proc/self/status")


def step(preset: Preset, batch: int, backend: str) -> None:
    """Forward and backward of a write, with gradients by everything it takes."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(batch, preset.K, preset.C, generator=generator).requires_grad_()
    values = torch.randn(batch, preset.T, preset.C, generator=generator).requires_grad_()
    cov = torch.eye(preset.K).repeat(batch, 1, 1).requires_grad_()
    written = write(MemoryState(mean, cov), values, 1.0, 1.0, backend=backend)
    (written.state.mean.square().sum() + written.kl.sum()).backward()


def resident(field: str) -> int:
    """Bytes resident now (``VmRSS``), or the most that were (``VmHWM``)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8", errors="replace").splitlines())
    return int(lines[field].split()[0]) * 1024


def peak_of_step(preset: Preset, batch: int, backend: str) -> int | None:
    """Bytes that a step adds at its peak; ``None`` on a system without ``/proc/self/status``."""
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", "fastkm.testing.peak", backend, preset.name, str(batch)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    backend, name, batch = sys.argv[1:]
    step(PRESETS["S"], 2, backend)  # loads what the first call loads, which is not counted
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts here
    before = resident("VmRSS")
    step(PRESETS[name], int(batch), backend)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()
