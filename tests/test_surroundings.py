"""Every public callable inside everything that PyTorch does to functions: one table of calls, one of surroundings.

The surroundings are those in which values cannot be asked: meta and fake tensors, make_fx, torch.compile, torch.export,
torch.jit.trace and vmap. A call must give there what it gives outside, or shapes where there are no values.
"""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from oracle import problem
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Distribution, kl_divergence
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import fastkm
from fastkm import KanervaMemory, KroneckerCovariance, MatrixNormal, MemoryState
from fastkm._runtime import dispatch, schema
from fastkm.models import DynamicKanervaMachine
from fastkm.testing.operations import OPERATIONS

B, T, Q, K, C = 3, 2, 5, 4, 6
NATIVE_MISSING = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))


class Call(NamedTuple):
    """A function of tensors, the batch first in each, with the module that it belongs to."""

    function: Callable[..., Any]  # function(module, *tensors)
    tensors: tuple[Tensor, ...]
    module: nn.Module | None = None
    draws: bool = False  # its values are random


def given(seed: int = 0, batch: int = B):
    return problem(batch, T, Q, K, C, torch.float32, seed=seed)


def operation(name: str, backend: str, seed: int = 0, batch: int = B) -> Call:
    """An operation of the registry as a function of its tensors."""
    op = OPERATIONS[name]
    leaves, spec = tree_flatten(op.arguments(oracle.as_episode(name, given(seed, batch))))
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def function(_, *tensors):
        filled = [*leaves]
        for i, x in zip(where, tensors, strict=True):
            filled[i] = x
        return op.function(**tree_unflatten(filled, spec), backend=backend)

    return Call(function, tuple(leaves[i] for i in where))


def memory(backend: str, **options: Any) -> KanervaMemory:
    torch.manual_seed(0)
    return KanervaMemory(C, K, learn_obs_noise=True, backend=backend, **options)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(C, 9)

    def forward(self, codes: Tensor) -> Distribution:
        pixels = torch.distributions.Normal(self.layer(codes), 1.0, validate_args=False)
        return torch.distributions.Independent(pixels, 1, validate_args=False)


def machine(backend: str) -> DynamicKanervaMachine:
    torch.manual_seed(0)
    return DynamicKanervaMachine(nn.Linear(9, C), Decoder(), memory(backend))


def own(name: str, backend: str, seed: int = 0, batch: int = B) -> Call:
    """The methods of modules and classes, and the function that has no backend."""
    p = given(seed, batch)
    (mean, cov), z, q, w = p.state, p.values, p.queries, p.weights
    col = (torch.eye(C) + 0.1).expand(batch, C, C).contiguous()
    images = (z.repeat(1, 1, 2)[..., :9] > 0).float()
    # The state's mean is read at all weights; the module writes with its own variances.
    table: dict[str, Callable[[], Call]] = {
        "memory": lambda: Call(lambda m, z, q: m(z, q), (z, q), memory(backend)),
        "memory.write": lambda: Call(lambda m, *x: m.write(x[0], MemoryState(*x[1:])), (z, mean, cov), memory(backend)),
        "memory.read": lambda: Call(lambda m, q, *s: m.read(q, s, num_iters=2), (q, mean, cov), memory(backend)),
        "memory.read of samples": lambda: Call(
            lambda m, q, *s: m.read(q, s), (q, mean, cov), memory(backend, sample_w=True, sample_memory=True), True
        ),
        "memory.attractor_read": lambda: Call(
            lambda m, q, *s: m.attractor_read(q, s, clean=torch.tanh, num_iters=3, tol=1e-3),
            (q, mean, cov),
            memory(backend if backend == "reference" else None),
        ),
        "memory.kl": lambda: Call(lambda m, *s: m.kl(s), (mean, cov), memory(backend)),
        "memory.kl_weights": lambda: Call(lambda m, w: m.kl_weights(w), (w,), memory(backend)),
        "memory.generate": lambda: Call(
            lambda m, q, *s: m.generate(s, q.shape[1], num_iters=2), (q, mean, cov), memory(backend), True
        ),
        "memory.prior_state": lambda: Call(lambda m, q: m.prior_state(q.shape[0]), (q,), memory(backend)),
        "machine": lambda: Call(lambda m, x: m(x), (images,), machine(backend), True),
        "machine.reconstruct": lambda: Call(
            lambda m, x, *s: m.reconstruct(x, state=s), (images, mean, cov), machine(backend)
        ),
        "machine.attractor_read": lambda: Call(
            lambda m, x, *s: m.attractor_read(x, 3, 1e-3, state=s), (images, mean, cov), machine(backend)
        ),
        "machine.generate": lambda: Call(
            lambda m, x, *s: m.generate(x.shape[1], 2, state=s), (images, mean, cov), machine(backend), True
        ),
        "machine.conditional_bound": lambda: Call(
            lambda m, x: m.conditional_bound(x, 2), (images,), machine(backend), True
        ),
        "kl_weights": lambda: Call(lambda _, w, v: fastkm.kl_weights(w, v.unsqueeze(-1), 1.0), (w, p.ridge)),
        "log_prob": lambda: Call(lambda _, m, u, v: MatrixNormal(m, u, v).log_prob(m + 1), (mean, cov, col)),
        "entropy": lambda: Call(lambda _, m, u: MatrixNormal(m, u).entropy(), (mean, cov)),
        "rsample": lambda: Call(lambda _, m, u: MatrixNormal(m, u).rsample(), (mean, cov), None, True),
        "kl_divergence": lambda: Call(
            lambda _, m, u, v: kl_divergence(MatrixNormal(m, u, v), MatrixNormal(0 * m, 2 * u)), (mean, cov, col)
        ),
        "kronecker": lambda: Call(_kronecker, (mean, cov, col)),
    }
    return table[name]()


def _kronecker(_: None, x: Tensor, row_cov: Tensor, col_cov: Tensor) -> tuple[Tensor, ...]:
    k = KroneckerCovariance(row_cov, col_cov)
    return k.matvec(x), k.solve(x), k.color(x), k.whiten(x), k.quadratic_form(x), k.logdet()


OWN = (
    "memory",
    "memory.write",
    "memory.read",
    "memory.read of samples",
    "memory.attractor_read",
    "memory.kl",
    "memory.kl_weights",
    "memory.generate",
    "memory.prior_state",
    "machine",
    "machine.reconstruct",
    "machine.attractor_read",
    "machine.generate",
    "machine.conditional_bound",
    "kl_weights",
    "log_prob",
    "entropy",
    "rsample",
    "kl_divergence",
    "kronecker",
)


def runs(name: str, backend: str) -> bool:
    capability = dispatch.CAPABILITIES.get(name, {"native": dispatch.NATIVE, "reference": dispatch.REFERENCE})
    return backend in capability and (not capability[backend].devices or "cpu" in capability[backend].devices)


CALLS = [
    pytest.param(make, name, backend, marks=[NATIVE_MISSING] if backend == "native" else [], id=f"{name}-{backend}")
    for make, names in ((operation, OPERATIONS), (own, OWN))
    for name in names
    for backend in ("reference", "native")
    if runs(name, backend)
]
# torch.distributions turns sizes into numbers, which torch.jit.trace makes constants of.
STATIC_IN_A_TRACE = ("log_prob", "entropy", "rsample", "kl_divergence", "memory.read of samples")
every_call = pytest.mark.parametrize(("make", "name", "backend"), CALLS)
pytestmark = pytest.mark.usefixtures("nothing_compiled_yet")


class Module(nn.Module):
    """A call as a module, for what takes modules only."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.inner, self.function = call.module, call.function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(self.inner, *tensors)


def leaves_of(call: Call, tensors: tuple[Tensor, ...] | None = None, module: nn.Module | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    return tree_leaves(call.function(module or call.module, *(call.tensors if tensors is None else tensors)))


def assert_same(call: Call, found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if not call.draws:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@every_call
def test_meta_tensors_have_shapes(make, name, backend):
    call = make(name, backend)
    module = copy.deepcopy(call.module).to("meta") if call.module else None
    for x, y in zip(leaves_of(call, [x.to("meta") for x in call.tensors], module), leaves_of(call), strict=True):
        assert (x.shape, x.dtype, x.device.type) == (y.shape, y.dtype, "meta")


@every_call
def test_fake_tensors_have_shapes(make, name, backend):
    call = make(name, backend)
    with FakeTensorMode() as mode:
        module = make(name, backend).module
        found = leaves_of(call, [mode.from_tensor(x) for x in call.tensors], module)
    for x, y in zip(found, leaves_of(call), strict=True):
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


@every_call
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(make, name, backend, mode):
    call = make(name, backend)
    with torch.no_grad():
        graph = make_fx(lambda *x: leaves_of(call, x), tracing_mode=mode, _allow_non_fake_inputs=True)(*call.tensors)
        assert_same(call, graph(*call.tensors), leaves_of(call))
        other = make(name, backend, seed=7)
        assert_same(call, graph(*other.tensors), leaves_of(other))


@every_call
def test_compiled_as_one_graph_of_any_size(make, name, backend):
    """Dynamo's part alone; what comes after it is that of make_fx."""
    call = make(name, backend)
    compiled = torch.compile(Module(call), backend="eager", fullgraph=True, dynamic=True)
    for batch in (B, B + 2):
        other = make(name, backend, 7, batch)
        torch.manual_seed(1)
        assert_same(call, tree_leaves(compiled(*other.tensors)), leaves_of(other))


@every_call
def test_exported_and_read_back(make, name, backend):
    call, file = make(name, backend), io.BytesIO()
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"tensors": tuple({0: batch} for _ in call.tensors)}
    with torch.no_grad():
        torch.export.save(torch.export.export(Module(call), call.tensors, dynamic_shapes=shapes), file)
    file.seek(0)
    loaded, other = torch.export.load(file).module(), make(name, backend, 7, B + 2)
    with torch.no_grad():
        found, expected = loaded(*other.tensors), other.function(other.module, *other.tensors)
    assert type(found) is type(expected)
    assert_same(call, tree_leaves(found), tree_leaves(expected))


@every_call
def test_traced_without_a_warning(make, name, backend):
    batch = B if name in STATIC_IN_A_TRACE else B + 2
    call, other = make(name, backend), make(name, backend, 7, batch)
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        for module in (r"fastkm\.", r"torch\.(?!jit)"):  # as after the import of both
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=module)
        traced = torch.jit.trace(Module(call), call.tensors, check_trace=not call.draws)
    assert not [str(warning.message) for warning in seen if warning.category is torch.jit.TracerWarning]
    assert_same(call, tree_leaves(traced(*other.tensors)), leaves_of(other))


@every_call
def test_vmap_is_the_loop(make, name, backend):
    calls = [make(name, backend, seed) for seed in range(2)]
    tensors = [torch.stack(x) for x in zip(*(call.tensors for call in calls), strict=True)]
    with torch.no_grad():
        mapped = vmap(lambda *x: tuple(leaves_of(calls[0], x)), randomness="different")(*tensors)
        for i, call in enumerate(calls):
            assert_same(call, [x[i] for x in mapped], leaves_of(calls[0], call.tensors))
