"""Problems of every shape, and how each operation of the package is called on one."""

import functools
import inspect
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkm import MemoryState
from fastkm._runtime import dispatch
from fastkm.testing import operations
from fastkm.testing.episodes import Episode
from fastkm.testing.operands import Operands

# Without what the tests of one family cover: a KL that has the reference only, and a function of one covariance.
# Operations that are differentiated, mapped, compiled and exported as functions of tensors.
TRANSFORMED = (
    "update_posterior",
    "remove_patterns",
    "replace_patterns",
    "update_square_root",
    "filter_posterior",
    "write",
    "read",
    "solve_addressing",
    "read_factored",
    "solve_factored",
    "kl_memory",
)

OPERATIONS = tuple(name for name in operations.OPERATIONS if name not in ("kl_memory_deepmind", "logdet"))


class Problem(NamedTuple):
    """Arguments for any function of the package, of agreeing sizes."""

    state: MemoryState
    weights: Tensor  # [B, T, K]
    values: Tensor  # [B, T, C]
    queries: Tensor  # [B, Q, C]
    noise_var: Tensor  # [B, T]
    ridge: Tensor  # [B]
    mask: Tensor | None  # [B, T]


# B, T, Q, K, C: one of everything, T > K, C < K, T > C, rows beside the vector widths, chunk boundaries. Many memories,
# because the worst error of a few is luck and the worst of many is a property of the algorithm.
SHAPES = [
    (1, 1, 1, 1, 1),
    (16, 3, 4, 5, 4),
    (15, 9, 2, 4, 7),
    (16, 5, 3, 13, 6),
    (16, 17, 5, 8, 16),
    (17, 2, 9, 3, 40),
    (8, 33, 6, 31, 20),
    (8, 70, 3, 17, 9),
    (16, 1, 1, 33, 1),
]
EMPTY_SHAPES = [(0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (2, 3, 0, 4, 5), (2, 3, 2, 0, 5), (2, 3, 2, 4, 0)]


def problem(B, T, Q, K, C, dtype=torch.float64, *, seed=0, masked=False) -> Problem:
    """A well-conditioned random problem: cov with eigenvalues of at least ½, σ² and λ between ½ and 1½."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    uniform = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    root = normal(B, K, K)
    cov = root @ root.mT / max(K, 1) + 0.5 * torch.eye(K, dtype=torch.float64)
    made = (
        normal(B, K, C) / math.sqrt(max(C, 1)),
        (cov + cov.mT) / 2,
        normal(B, T, K) / math.sqrt(max(K, 1)),
        normal(B, T, C),
        normal(B, Q, C),
        0.5 + uniform(B, T),
        0.5 + uniform(B),
    )
    mean, cov, *rest = (x.to(dtype) for x in made)
    return Problem(MemoryState(mean, cov), *rest, uniform(B, T) < 0.6 if masked else None)


def map_tensors(p: Problem, change) -> Problem:
    """The problem with ``change`` applied to every tensor."""
    state = MemoryState(*map(change, p.state))
    return Problem(state, *(None if x is None else change(x) for x in p[1:]))


def tensors(p: Problem) -> list[Tensor]:
    return [x for x in (*p.state, *p[1:]) if x is not None]


def runs_on_cpu(operation: str, backend: str) -> bool:
    """Whether the backend has the operation at all, and for tensors on the CPU."""
    capability = dispatch.CAPABILITIES[operation].get(backend)
    return capability is not None and (not capability.devices or "cpu" in capability.devices)


def as_episode(operation: str, p: Problem) -> Episode:
    """The problem as the registry of operations takes it; a KL is to a memory with another mean and a wider cov."""
    e = Episode(p.state, p.values, p.weights, p.state, p.queries, p.noise_var, p.ridge, 3, torch.tanh)
    if operation == "attractor_read":
        return e._replace(noise_var=p.ridge.unsqueeze(-1))  # one variance a memory, whatever T is
    if operation in ("remove_patterns", "replace_patterns"):
        return e._replace(weights=0.05 * p.weights)  # any memory holds so little of a pattern
    if operation == "kl_memory":
        return e._replace(prior=MemoryState(p.state.mean * 0.5, p.state.cov * 1.5))
    return e


def call(operation: str, p: Problem, backend: str | None, **options):
    """Run an operation of the package on a problem."""
    if "mask" in inspect.signature(operations.OPERATIONS[operation].function).parameters:
        options = {"mask": p.mask, **options}
    if operation == "attractor_read":
        options = {"weight_var": 0.0, **options}
    return operations.OPERATIONS[operation].bind(as_episode(operation, p), backend, **options)()


def as_operands(p: Problem, **options) -> Operands:
    """The problem as the registered operators take it."""
    return Operands(*p.state, p.weights, p.values, p.queries, p.weights, p.noise_var, p.ridge, p.mask, **options)
