"""The only place that decides who computes: what each backend can do, and which one a call takes.

``backend=None`` takes the first backend of ``PREFERENCE`` that can run the call, by the table ``CAPABILITIES``; a few
large memories on a GPU go to the reference, by the rule of :func:`leaves_gpu_empty`. A named backend that cannot run a
call raises, with the reason and the remedy. Nothing falls back in silence.
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
    low_precision: tuple[str, ...] = ()  # devices where it reads bfloat16 and float16 codes as they are


REFERENCE = Capability()
NATIVE = Capability({"cpu": DTYPES, "cuda": FLOAT32}, low_precision=("cuda",))
NATIVE_READ = NATIVE._replace(low_precision=("cpu", "cuda"))
TRITON = Capability({"cuda": FLOAT32}, low_precision=("cpu", "cuda", "meta"))
INTO = {
    name: each._replace(gradients=False)
    for name, each in (("reference", REFERENCE), ("native", NATIVE), ("triton", TRITON))
}
ON_CPU = Capability({"cpu": DTYPES})

# operation -> backend -> what it can do; an absent backend has no kernel for the operation.
CAPABILITIES: dict[str, dict[str, Capability]] = {
    "solve_addressing": {"reference": REFERENCE, "native": NATIVE_READ, "triton": TRITON},
    "factor_addressing": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "solve_factored": {"reference": REFERENCE, "native": NATIVE_READ, "triton": TRITON},
    "update_posterior": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "write": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "update_posterior_into": INTO,  # with ``out``
    "write_into": INTO,
    "remove_patterns": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "replace_patterns": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "update_square_root": {"reference": REFERENCE, "native": ON_CPU},
    "filter_posterior": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "read": {"reference": REFERENCE, "native": NATIVE_READ, "triton": TRITON},
    "read_factored": {"reference": REFERENCE, "native": NATIVE_READ, "triton": TRITON},
    "attractor_read": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "stream": {"reference": Capability(gradients=False), "native": ON_CPU._replace(gradients=False)},
    "kl_memory": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
    "kl_memory_deepmind": {"reference": REFERENCE},
    "logdet": {"reference": REFERENCE, "native": NATIVE, "triton": TRITON},
}

LARGE_ROWS = 1024
ROWS_A_FACTORISATION = 256
# Operations that factor anew for each pattern in PyTorch's own operations; their third tensor is values [B, T, C].
FACTORING_EACH_PATTERN = ("write", "write_into")


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


def leaves_gpu_empty(operation: str, *tensors: Tensor) -> bool:
    """Whether a few large memories are faster in PyTorch's own operations, which spread one matrix over the whole GPU.

    A kernel computes the K³ of a memory in one thread block, 1/132 of an H100 (the table of launches in
    docs/results/kernels.md); other memories have other blocks, so its time does not depend on their number. PyTorch
    factors one matrix after the other, in a time that grows like K² while the matrix does not fill the chip. So PyTorch
    is ahead up to a number of factorisations in proportion to K: one for every 256 rows, from 1,024 rows on. A write in
    PyTorch factors anew for each pattern. The two numbers come from counts of operations; no GPU has measured them.
    """
    if not tensors or not tensors[0].is_cuda or tensors[0].dim() != 3:
        return False
    factorisations, rows = tensors[0].shape[:2]
    if rows < LARGE_ROWS:  # first, so that a graph of small memories has no condition on their number
        return False
    if operation in FACTORING_EACH_PATTERN and len(tensors) > 2:
        factorisations = factorisations * tensors[2].shape[1]
    return ROWS_A_FACTORISATION * factorisations <= rows


def resolve(operation: str, backend: str | None, *tensors: Tensor) -> str:
    """The backend that will run ``operation`` on ``tensors``. The first tensor belongs to the memory.

    The value of ``FASTKM_BACKEND`` at import names the backend of every call that names none.
    """
    if backend is None:
        backend = CHOSEN
    if backend is None and leaves_gpu_empty(operation, *tensors):
        return "reference"
    if backend is None:
        return next(name for name in PREFERENCE if why_not(operation, name, *tensors) is None)
    if backend not in PREFERENCE:
        raise ValueError(f"backend must be one of {', '.join(map(repr, PREFERENCE))} or None, got {backend!r}")
    if reason := why_not(operation, backend, *tensors):
        raise BackendUnavailableError(f"backend {backend!r} cannot run {operation}: {reason}")
    return backend


def reads_low_precision(operation: str, backend: str, device: str) -> bool:
    """Whether ``backend`` reads bfloat16 and float16 codes as they are. The others take the memory's dtype."""
    capability = CAPABILITIES.get(operation, {}).get(backend)
    return capability is not None and device in capability.low_precision


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
    unnamed = backend is None and CHOSEN is None
    reasons = {name: why_not(operation, name, *tensors) for name in PREFERENCE}
    said = {name: "can run" if reason is None else f"no: {reason}" for name, reason in reasons.items()}
    if unnamed and list(said.values()).index("can run") != PREFERENCE.index(taken):
        few = "can run, but so few memories of this size leave the GPU empty; name it to have it"
        said = {name: few if word == "can run" else word for name, word in said.items()}
        said[taken] = "taken: the block form in PyTorch's own operations, which spread over the GPU"
    else:
        said[taken] = "taken"
    print(f"{operation}: {taken}")
    for name, words in said.items():
        print(f"  {name:<10} {words}")
