"""The only place that decides who computes: what each backend can do, and which one a call takes.

``backend=None`` takes the first backend of ``PREFERENCE`` that can run the call, by the table ``CAPABILITIES``. A named
backend that cannot run it raises, with the reason and the remedy; nothing ever falls back in silence.
"""

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from fastkm._runtime import schema
from fastkm._runtime.autograd import Differentiable, transformed, wants_gradient
from fastkm._runtime.guards import DTYPES
from fastkm.state import MemoryState

PREFERENCE = ("native", "triton", "reference")
FLOAT32 = (torch.float32,)
# The backend of every call that names none. Read once: to ask the environment took a fifth of what a call costs here.
CHOSEN = os.environ.get("FASTKM_BACKEND") or None


class Capability(NamedTuple):
    """What one backend can do for one operation."""

    devices: Mapping[str, tuple[torch.dtype, ...]] = {}  # device -> dtypes of a memory; empty means any
    gradients: bool = True


REFERENCE = Capability()
NATIVE = Capability({"cpu": DTYPES, "cuda": FLOAT32})
TRITON = Capability({"cuda": FLOAT32})
ON_GPU = Capability({"cuda": FLOAT32}, gradients=False)

# operation -> backend -> what it can do; an absent backend has no kernel for the operation.
CAPABILITIES: dict[str, dict[str, Capability]] = {
    "solve_addressing": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "update_posterior": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "write": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "read": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "attractor_read": {"reference": REFERENCE, "native": ON_GPU, "triton": ON_GPU},
    "kl_memory": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "kl_memory_deepmind": {"reference": REFERENCE},
    "logdet": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
}


class BackendUnavailableError(RuntimeError):
    """A backend was named that cannot run this call."""


def why_not(operation: str, backend: str, *tensors: Tensor) -> str | None:
    """Why ``backend`` cannot run ``operation`` on these tensors, with the remedy; ``None`` if it can."""
    capability = CAPABILITIES[operation].get(backend)
    if capability is None:
        has = ", ".join(repr(name) for name in CAPABILITIES[operation])
        return f"there is no {backend} kernel for {operation}; it has {has}"
    device, dtype = (tensors[0].device.type, tensors[0].dtype) if tensors else ("cpu", torch.float32)
    if reason := _not_installed(backend, device):
        return f"{reason}, or take backend='reference'"
    if capability.devices and device not in capability.devices:
        return f"it runs on {', '.join(capability.devices)}, the tensors are on {device}; take backend='reference'"
    if capability.devices and dtype not in capability.devices[device]:
        takes, given = (", ".join(map(_name, x)) for x in (capability.devices[device], (dtype,)))
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
    if backend == "triton" and find_spec("triton") is None:
        return "Triton is not installed; pip install 'fastkm[triton]'"
    return None


def resolve(operation: str, backend: str | None, *tensors: Tensor) -> str:
    """The backend that will run ``operation`` on ``tensors``, of which the first is of the memory.

    ``FASTKM_BACKEND``, as it was when the package was imported, names the backend of every call that names none.
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


_HERE = (None, "native")
_NUMBERS = (int, bool, type(None))


def straight(native: Differentiable, backend: str | None, *arguments: Any) -> tuple[Tensor, ...] | None:
    """What the compiled operator returns for a call as plain as most are, or None: then the guards must run.

    Plain is a call on tensors of the CPU, outside every transform and autocast, that names no backend but this one. The
    operator refuses all that the guards refuse, before it touches memory, but cannot say it in their words; so after a
    refusal, or a status that is not good, the guards have their say. ``arguments`` are the caller's own: a state stands
    for its two tensors, a float for a tensor of the dtype of the first.
    """
    if is_compiling() or _is_any_autocast_enabled() or transformed() or schema.unavailable is not None:
        return None
    if (CHOSEN if backend is None else backend) not in _HERE:
        return None
    plain: list = []
    gradient = False
    try:
        for x in arguments:
            kind = type(x)
            if kind is not Tensor:  # asked first: most are, and this loop is half of what a call costs here
                if kind is float:
                    plain.append(_constant(x, plain[0].dtype))
                    continue
                if kind in _NUMBERS:
                    plain.append(x)
                    continue
                if kind is MemoryState:
                    mean, x = x
                    gradient = gradient or mean.requires_grad
                    plain.append(mean)
            gradient = gradient or x.requires_grad
            plain.append(x)
        if not plain[0].is_cpu:  # the others the operator refuses where they are not with the first
            return None
        gradient = gradient and torch.is_grad_enabled()
        if not gradient:
            outputs = native.operator(*plain)
        elif CAPABILITIES[native.name]["native"].gradients:
            with torch.no_grad():
                outputs = native.operator(*plain)
        else:
            return None
        if any(outputs[-1].tolist()):
            return None
    except Exception:  # whatever it is, the guards find it too
        return None
    return native.attach(outputs, plain) if gradient else outputs


@lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor that nobody writes to."""
    with _disable_current_modes():
        return torch.full((), value, dtype=dtype, device="cpu")


def accepted(backend: str, memory: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Inputs as ``backend`` takes them: kernels on a GPU read low precision as it is, the others the memory's dtype."""
    if backend == "triton" or (backend == "native" and memory.is_cuda):
        return inputs
    return tuple(x if x.dtype == memory.dtype else x.to(memory.dtype) for x in inputs)


def on_first_use(module: str, name: str) -> Callable:
    """A function of a module that is imported by the first call: nothing imports Triton that does not run it."""
    return lambda *arguments: getattr(import_module(module), name)(*arguments)


def exact(reference: Callable) -> Callable:
    """A reference as an operator that ends in ``precision``: it has only the one."""
    return lambda *arguments: reference(*arguments[:-1])


def explain_backend(operation: str, *tensors: Tensor, backend: str | None = None) -> None:
    """Print which backend a call of ``operation`` on ``tensors`` would take, and why the others would not run.

    >>> fastkm.explain_backend("write", state.mean, state.cov, values)
    write: native
      native     taken
      triton     no: there is no triton kernel for write; it has 'reference', 'native'
      reference  can run
    """
    if operation not in CAPABILITIES:
        raise ValueError(f"operation must be one of {', '.join(map(repr, CAPABILITIES))}, got {operation!r}")
    taken = resolve(operation, backend, *tensors)
    print(f"{operation}: {taken}")
    for name in PREFERENCE:
        reason = why_not(operation, name, *tensors)
        print(f"  {name:<10} {'taken' if name == taken else 'can run' if reason is None else f'no: {reason}'}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
