"""The only place that decides who computes: what each backend can do, and which one a call takes.

``backend=None`` takes the first backend of ``PREFERENCE`` that can run the call, by the table ``CAPABILITIES``. A named
backend that cannot run it raises, with the reason and the remedy. Nothing falls back in silence.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fastkm._runtime import schema
from fastkm._runtime.autograd import wants_gradient
from fastkm._runtime.errors import BackendUnavailableError
from fastkm._runtime.guards import DTYPES, dtype_name

PREFERENCE = ("native", "triton", "reference")
FLOAT32 = (torch.float32,)
# The backend of every call that names none. Read once: asking the environment took a fifth of a call's overhead.
CHOSEN = os.environ.get("FASTKM_BACKEND") or None
has_triton = find_spec("triton") is not None  # asked once: torch.compile cannot trace the question


class Capability(NamedTuple):
    """What one backend can do for one operation."""

    devices: Mapping[str, tuple[torch.dtype, ...]] = {}  # device -> dtypes of a memory; empty means any
    gradients: bool = True


REFERENCE = Capability()
NATIVE = Capability({"cpu": DTYPES, "cuda": FLOAT32})
TRITON = Capability({"cuda": FLOAT32})
ON_CPU = Capability({"cpu": DTYPES})
ON_GPU = Capability({"cuda": FLOAT32}, gradients=False)

# operation -> backend -> what it can do; an absent backend has no kernel for the operation.
CAPABILITIES: dict[str, dict[str, Capability]] = {
    "solve_addressing": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "update_posterior": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "write": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "filter_posterior": {"reference": REFERENCE, "native": ON_CPU},
    "read": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "attractor_read": {"reference": REFERENCE, "native": ON_GPU, "triton": ON_GPU},
    "kl_memory": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "kl_memory_deepmind": {"reference": REFERENCE},
    "logdet": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
}


def why_not(operation: str, backend: str, *tensors: Tensor) -> str | None:
    """Why ``backend`` cannot run ``operation`` on these tensors, with the remedy; ``None`` if it can."""
    capability = CAPABILITIES[operation].get(backend)
    if capability is None:
        has = ", ".join(repr(name) for name in CAPABILITIES[operation])
        return f"there is no {backend} kernel for {operation}; it has {has}"
    device, dtype = (tensors[0].device.type, tensors[0].dtype) if tensors else ("cpu", torch.float32)
    if reason := _not_installed(backend, device):
        return f"{reason}, or take backend='reference'"
    only = None if device == "meta" else capability.devices  # meta tensors hold no values that a kernel would read
    if only and device not in only:
        return f"it runs on {', '.join(only)}, the tensors are on {device}; take backend='reference'"
    if only and dtype not in only[device]:
        takes, given = (", ".join(map(dtype_name, x)) for x in (only[device], (dtype,)))
        return f"on {device} it computes in {takes}, the memory is {given}; take backend='reference'"
    if not capability.gradients and wants_gradient(tensors):
        return (
            f"it has no gradient for {operation} yet and an input requires one; "
            "take backend='reference', or call it under torch.no_grad()"
        )
    return None


def _not_installed(backend: str, device: str) -> str | None:
    if backend == "native" and schema.unavailable is not None:
        return f"{schema.unavailable}; install a C++ compiler (g++) and reinstall fastkm with --no-build-isolation"
    if backend == "native" and device == "cuda" and not schema.has_cuda:
        return (
            "the extension was built without CUDA; install the CUDA toolkit (nvcc) and reinstall fastkm with "
            "FASTKM_CUDA=1 and --no-build-isolation"
        )
    if backend == "triton" and not has_triton:
        return "Triton is not installed; pip install 'fastkm[triton]'"
    return None


def resolve(operation: str, backend: str | None, *tensors: Tensor) -> str:
    """The backend that will run ``operation`` on ``tensors``. The first tensor belongs to the memory.

    The value of ``FASTKM_BACKEND`` at import names the backend of every call that names none.
    """
    if backend is None:
        backend = CHOSEN
    if backend is None:
        return next(name for name in PREFERENCE if why_not(operation, name, *tensors) is None)
    if backend not in PREFERENCE:
        raise ValueError(f"backend must be one of {', '.join(map(repr, PREFERENCE))} or None, got {backend!r}")
    if reason := why_not(operation, backend, *tensors):
        raise BackendUnavailableError(f"backend {backend!r} cannot run {operation}: {reason}")
    return backend


def reads_low_precision(backend: str, memory: Tensor) -> bool:
    """Whether ``backend`` reads bfloat16 and float16 codes as they are. The others take the memory's dtype."""
    return backend == "triton" or (backend == "native" and memory.is_cuda)


def explain_backend(operation: str, *tensors: Tensor, backend: str | None = None) -> None:
    """Print which backend a call of ``operation`` on ``tensors`` would take, and why the others would not run.

    >>> fastkm.explain_backend("write", state.mean, state.cov, values)
    write: native
      native     taken
      triton     no: it runs on cuda, the tensors are on cpu; take backend='reference'
      reference  can run
    """
    if operation not in CAPABILITIES:
        raise ValueError(f"operation must be one of {', '.join(map(repr, CAPABILITIES))}, got {operation!r}")
    taken = resolve(operation, backend, *tensors)
    print(f"{operation}: {taken}")
    for name in PREFERENCE:
        reason = why_not(operation, name, *tensors)
        print(f"  {name:<10} {'taken' if name == taken else 'can run' if reason is None else f'no: {reason}'}")
