"""``python -m fastkm doctor``: what was built, which backends run here, and why the others do not."""

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastkm
from fastkm._runtime import dispatch, guards, schema
from fastkm.cli.console import markdown_table, show_table
from fastkm.cli.machine import machine

EXTRAS = ("triton", "safetensors", "rich", "matplotlib", "mlxtend", "pillow", "pytest-benchmark")


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def extension() -> str:
    path = Path(fastkm.__file__).with_name("_C.abi3.so")
    return f"loaded from {path}" if schema.unavailable is None else f"not loaded: {schema.unavailable}"


def build() -> dict[str, str]:
    """How the extension was built, as it tells itself."""
    if not (facts := schema.build_facts()):
        return {}
    return {
        "built by": facts["compiler"],
        "built levels": facts["instruction levels"],
        "built with torch": facts["torch"],
        "flags left out": facts["flags left out"] or "none",
    }


def cuda() -> str:
    built = "kernels not built (no nvcc at install time, or FASTKM_CUDA=0)"
    if architectures := schema.cuda_architectures():
        compiled = ", ".join(f"sm_{architecture}" for architecture in architectures)
        built = f"kernels built by CUDA {schema.build_facts()['CUDA']} for {compiled} and PTX"
    if not torch.cuda.is_available():
        return f"{built}; no device that torch can use"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return f"{built}; {', '.join(sorted(names))}"


def backends() -> tuple[str, ...]:
    """The backends that have a kernel for anything, the reference first."""
    known = {name for capable in dispatch.CAPABILITIES.values() for name in capable}
    return tuple(name for name in reversed(dispatch.PREFERENCE) if name in known)


def capability_table() -> str:
    """What every backend can do, in Markdown; the table of the README."""

    def cell(capability: dispatch.Capability | None) -> str:
        if capability is None:
            return "–"
        devices = {name.upper(): dtypes for name, dtypes in capability.devices.items()}
        runs = (f"{name} {dtypes(of)}" for name, of in (devices or {"any device": guards.DTYPES}).items())
        return f"{'; '.join(runs)}; {'gradients' if capability.gradients else 'forward only'}"

    def dtypes(of: tuple) -> str:
        return ", ".join(str(dtype).removeprefix("torch.") for dtype in of)

    rows = [
        (f"`{operation}`", *(cell(capable.get(name)) for name in backends()))
        for operation, capable in dispatch.CAPABILITIES.items()
    ]
    return markdown_table(("operation", *backends()), rows)


def print_capabilities(_: argparse.Namespace) -> int:
    print(capability_table())
    return 0


def run(_: argparse.Namespace) -> int:
    facts = {name: str(value) for name, value in machine().items()}
    facts |= {"extension": extension(), **build(), "CUDA": cuda(), "Triton": installed("triton")}
    facts |= {"optional packages": ", ".join(f"{package} {installed(package)}" for package in EXTRAS[1:])}
    for name, value in facts.items():
        print(f"{name:<18} {value}")
    print()

    reasons: list[str] = []
    rows = []
    for operation, capable in dispatch.CAPABILITIES.items():
        cells = []
        for name in backends():
            reason = dispatch.why_not(operation, name)
            if reason and name in capable and reason not in reasons:
                reasons.append(reason)
            cells.append("–" if name not in capable else f"no [{reasons.index(reason) + 1}]" if reason else "runs")
        rows.append((operation, dispatch.resolve(operation, None), *cells))
    show_table("What runs here (CPU tensors, no gradient)", ("operation", "taken by default", *backends()), rows)
    for number, reason in enumerate(reasons, 1):
        print(f"[{number}] {reason}")
    return 0
