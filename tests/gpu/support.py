"""What the tests of all families share: shapes, the kernels under test, and checks of values and gradients."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import oracle
import pytest
import torch
from oracle import Problem, flat, map_tensors
from torch import Tensor
from torch.utils._pytree import tree_map

import fastkm
from fastkm import MemoryState
from fastkm._runtime.dispatch import CAPABILITIES, NATIVE

# B, T, Q, K, C: one of everything; less than a tile of each; T over chunks, C over tiles, K beside a power of two.
SHAPES = [(16, 1, 1, 1, 1), (3, 9, 4, 5, 7), (2, 20, 18, 24, 40), (2, 17, 3, 40, 70)]
USES = {  # the tensors of a problem that an operation is a function of
    "update_posterior": ("mean", "cov", "weights", "values", "noise_var"),
    "remove_patterns": ("mean", "cov", "weights", "values", "noise_var"),
    "replace_patterns": ("mean", "cov", "weights", "values", "noise_var"),
    "filter_posterior": ("mean", "cov", "weights", "values", "noise_var", "ridge"),
    "write": ("mean", "cov", "values", "noise_var", "ridge"),
    "read": ("mean", "queries", "ridge"),
    "solve_addressing": ("mean", "queries", "ridge"),
    "kl_memory": ("mean", "cov"),
    "logdet": ("cov",),
}


# Operations that the native backend has on CPUs only; asked before a test lets kernels run where they do not.
WITHOUT_CUDA = {name for name, table in CAPABILITIES.items() if "cuda" not in table.get("native", NATIVE).devices}


def only_with_kernels(kernels: "Kernels", operation: str) -> None:
    """Skip where there is no kernel for GPUs: the native backend would run the one for CPUs."""
    if kernels.backend == "native" and operation in WITHOUT_CUDA:
        pytest.skip(f"there is no CUDA kernel of {operation}")


class Kernels(NamedTuple):
    """The kernels under test: the backend that has them and the device they compute on."""

    backend: str
    device: str

    def put(self, tree):
        """Every tensor of ``tree`` on the device."""
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, tree)

    def call(self, operation: str, p: Problem, backend: str | None = None, **options) -> dict[str, Tensor]:
        """The outputs of an operation on a problem by name; a reference computes on the CPU."""
        if backend == "reference":
            return outputs(operation, p, backend, **options)
        only_with_kernels(self, operation)
        return {name: x.cpu() for name, x in outputs(operation, self.put(p), self.backend, **options).items()}

    def judge(
        self,
        operation: str,
        p: Problem,
        truth: dict[str, Tensor],
        *,
        draws: int = 3,
        times: Mapping[str, float] = {},
        **options,
    ) -> None:
        """Errors are at most twice those of the reference in float32, or ``times`` in a field that it names."""

        def run(p, backend):
            return Outputs(self.call(operation, p, backend, **options))

        oracle.judge(run, p, truth, self.backend, draws=draws, times=times)

    def judge_gradient(self, operation: str, p: Problem, **options) -> None:
        """Errors are at most three times those of the reference in float32; the truth is the reference in float64."""
        only_with_kernels(self, operation)
        given = cotangents(outputs(operation, p, "reference", **options))
        truth = gradients(self, operation, map_tensors(p, widened), "reference", given, **options)
        own = [self._own_gradients(operation, p, given, seed, **options) for seed in range(3)]
        found = gradients(self, operation, p, self.backend, given, **options)
        for name, expected in truth.items():
            wrong, scale = oracle.error(found[name], expected), oracle.largest(expected)
            worst = max(oracle.error(draw[name], expected) for draw in own)
            bound = 3 * (worst + 4 * torch.finfo(torch.float32).eps * scale)
            assert wrong <= bound, f"{name}: error {wrong:.3g} exceeds {bound:.3g}"

    def _own_gradients(self, operation: str, p: Problem, given: dict[str, Tensor], seed: int, **options):
        """Gradients of the reference in float32, with the rows of the memory in another order: another rounding."""
        rows = p.state.mean.shape[1]
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(rows)

        def reorder(name: str, x: Tensor, by: Tensor) -> Tensor:
            x = x[:, by] if name in ("mean", "cov") else x
            return x[..., by] if name in ("cov", "weights") else x

        state = MemoryState(*(reorder(name, x, order) for name, x in p.state._asdict().items()))
        shuffled = p._replace(state=state, weights=p.weights[..., order])
        found = gradients(
            self, operation, shuffled, "reference", {k: reorder(k, x, order) for k, x in given.items()}, **options
        )
        return {name: reorder(name, x, order.argsort()) for name, x in found.items()}


class Outputs(dict):
    """Named outputs as the oracle takes a result."""

    def _asdict(self):
        return self


def widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def outputs(operation: str, p: Problem, backend: str, **options) -> dict[str, Tensor]:
    if operation == "logdet":
        return {"logdet": fastkm.matrix_normal.logdet(p.state.cov, backend=backend)}
    return flat(oracle.call(operation, p, backend, **options))


def cotangents(of: dict[str, Tensor]) -> dict[str, Tensor]:
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1))
    return {name: normal(x.shape).to(x.dtype) for name, x in of.items()}


def gradients(kernels: Kernels, operation: str, p: Problem, backend: str, given: dict[str, Tensor], **options):
    """Gradients of the outputs with a cotangent in ``given``. That of ``cov`` is symmetrised: only that is defined."""
    if backend != "reference":
        p, given = kernels.put(p), kernels.put(given)
    named = p.state._asdict() | p._asdict()
    inputs = {name: named[name].detach().requires_grad_() for name in USES[operation]}
    named |= inputs
    p = Problem(MemoryState(named["mean"], named["cov"]), *(named[name] for name in Problem._fields[1:]))
    results = outputs(operation, p, backend, **options)
    used = [name for name in given if results[name].requires_grad]
    found = torch.autograd.grad(
        [results[name] for name in used],
        list(inputs.values()),
        [given[name].to(results[name].dtype) for name in used],
        materialize_grads=True,
    )
    found = {name: x.cpu() for name, x in zip(inputs, found, strict=True)}
    if "cov" in found:
        found["cov"] = found["cov"] + found["cov"].mT
    return found
