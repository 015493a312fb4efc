"""The native kernels inside torch.compile: one graph, the results of eager, and no recompilation with the sizes."""

import shutil
import sysconfig
from pathlib import Path

import oracle
import pytest
import torch
from oracle import TRANSFORMED, call, flat, problem
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastkm
from fastkm import KanervaMemory
from fastkm._runtime import dispatch, schema

pytestmark = [
    pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable)),
    pytest.mark.usefixtures("nothing_compiled_yet"),
]

WIDTH, CODE, ROWS = 9, 7, 5
PYTHON_HEADER = Path(sysconfig.get_path("include"), "Python.h")


class Model(nn.Module):
    """Everything a KanervaMemory does in training, between linear layers."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, CODE), nn.Linear(CODE, WIDTH)
        self.memory = KanervaMemory(CODE, ROWS, learn_obs_noise=True, backend="native")

    def forward(self, x, mask=None):
        code = self.encoder(x)
        state, weights, _, _ = self.memory.write(code, mask=mask)
        decoded = self.decoder(self.memory.read(code, state, num_iters=2).values)
        kl = self.memory.kl(state).sum() + self.memory.kl_weights(weights).sum()
        return (decoded - x).square().sum() + kl


def loss_and_gradients(function, parameters, *inputs):
    loss = function(*inputs)
    return loss, *torch.autograd.grad(loss, list(parameters))


def assert_all_close(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        oracle.assert_close(x, y)


def test_the_module_forward_and_backward_for_any_size():
    """One graph for the first sizes, one for all others."""
    module, counter = Model().double(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for step, (B, T) in enumerate([(2, 3), (4, 6), (5, 4), (3, 9), (7, 2)]):
        x = torch.randn(B, T, WIDTH, dtype=torch.float64)
        expected = loss_and_gradients(module, module.parameters(), x)
        assert_all_close(loss_and_gradients(compiled, module.parameters(), x), expected)
        assert counter.frame_count == min(step + 1, 2), f"recompiled for B = {B}, T = {T}"


@pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("openssl") and PYTHON_HEADER.exists()),
    reason="inductor needs g++, openssl and Python.h (python3-dev), which the package itself does not",
)
def test_the_module_in_inductor():
    """Generated code around the kernels; with a mask."""
    module, x = Model(), torch.randn(3, 8, WIDTH)
    mask = torch.rand(3, 8) < 0.6
    compiled = torch.compile(module, fullgraph=True)
    expected = loss_and_gradients(module, module.parameters(), x, mask)
    assert_all_close(loss_and_gradients(compiled, module.parameters(), x, mask), expected)
    with torch.no_grad():
        oracle.assert_close(compiled(x, mask), module(x, mask))


@pytest.mark.parametrize("operation", TRANSFORMED)
@pytest.mark.parametrize("masked", [False, True])
def test_every_operation(operation, masked):
    """Forward and backward, every output and every argument; the kernel is one node of the graph."""
    p, graphs = problem(2, 5, 3, 4, 6, masked=masked), []

    def function(*tensors):
        state, rest = fastkm.MemoryState(*tensors[:2]), tensors[2:]
        rest = rest if masked else (*rest, None)
        return tuple(flat(call(operation, oracle.Problem(state, *rest), "native")).values())

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in oracle.tensors(p)]
    wanted = [x for x in leaves if x.requires_grad]
    results = []
    for f in (function, torch.compile(function, backend=backend, fullgraph=True)):
        outputs = f(*leaves)
        total = sum((x * torch.arange(1.0, 1 + x.numel()).view(x.shape)).sum() for x in outputs)
        results.append((*outputs, *torch.autograd.grad(total, wanted, materialize_grads=True)))
    assert_all_close(*reversed(results))
    assert len(graphs) == 1
    operator = getattr(torch.ops.fastkm, operation).default
    nodes = [
        node
        for module in graphs[0].modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
    ]
    assert sum(node.target == operator for node in nodes) == 1


@pytest.mark.parametrize("operation", TRANSFORMED)
def test_without_a_gradient(operation):
    p = problem(2, 5, 3, 4, 6, masked=True)
    compiled = torch.compile(lambda p: call(operation, p, "native"), backend="aot_eager", fullgraph=True)
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            assert oracle.equal(compiled(p), call(operation, p, "native"))


def test_the_reference_compiles_too():
    p = problem(2, 3, 3, 4, 6)
    compiled = torch.compile(lambda p: call("write", p, "reference"), backend="aot_eager", fullgraph=True)
    assert_all_close(flat(compiled(p)).values(), flat(call("write", p, "reference")).values())


def test_errors_of_a_compiled_graph():
    """Shapes and dtypes raise while tracing, values when the graph runs: a graph has no values to branch on."""
    p = problem(2, 5, 3, 4, 6)

    def logdet(cov):
        return fastkm.matrix_normal.logdet(cov, backend="native")

    def solve(mean, queries, ridge):
        return fastkm.solve_addressing(mean, queries, ridge, backend="native")

    compiled = torch.compile(logdet, backend="aot_eager", fullgraph=True)
    oracle.assert_close(compiled(p.state.cov), logdet(p.state.cov))
    with pytest.raises(RuntimeError, match="cov is not symmetric positive definite"):
        compiled(-p.state.cov)
    compiled = torch.compile(solve, backend="aot_eager", fullgraph=True)
    oracle.assert_close(compiled(p.state.mean, p.queries, p.ridge), solve(p.state.mean, p.queries, p.ridge))
    with pytest.raises(RuntimeError, match="ridge must be positive"):
        compiled(p.state.mean, p.queries, -p.ridge)
    with pytest.raises(Exception, match=r"(?s)queries.* must have shape"):  # torch 2.10 prints the words one by one
        compiled(p.state.mean, p.queries[:, :, 1:], p.ridge)


@pytest.mark.parametrize("function", ["write", "read", "attractor_read", "kl_weights"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_float_that_changes_compiles_twice_at_most(function, backend):
    """Once for its first value, and once for all others."""
    p, counter = problem(2, 3, 3, 4, 6, torch.float32), CompileCounterWithBackend("aot_eager")
    calls = {
        "write": lambda v: fastkm.write(p.state, p.values, v, v, backend=backend).state.mean,
        "read": lambda v: fastkm.read(p.state.mean, p.queries, v, backend=backend).values,
        "attractor_read": lambda v: (
            fastkm.attractor_read(
                p.state, p.queries, v, v, clean=torch.tanh, num_iters=2, weight_var=v, backend="reference"
            ).energy
        ),
        "kl_weights": lambda v: fastkm.kl_weights(p.weights, v, 2 * v),
    }
    compiled = torch.compile(calls[function], backend=counter, fullgraph=True)
    for i in range(4):
        oracle.assert_close(compiled(1 + i / 10), calls[function](1 + i / 10))
    assert counter.frame_count <= 2


def test_variable_decides_for_the_graph(monkeypatch):
    """FASTKM_BACKEND is part of the graph."""
    p, operator = problem(2, 3, 3, 4, 6), torch.ops.fastkm.read.default

    def nodes():
        torch._dynamo.reset()
        seen = []

        def backend(graph, _):
            seen.extend(node.target for node in graph.graph.nodes)
            return graph

        torch.compile(lambda p: call("read", p, None), backend=backend, fullgraph=True)(p)
        return seen

    assert operator in nodes()
    monkeypatch.setattr(dispatch, "CHOSEN", "reference")
    assert operator not in nodes()


def test_under_autocast():
    module, x = Model(), torch.randn(3, 8, WIDTH)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (loss_and_gradients(f, module.parameters(), x) for f in (module, compiled))
    for a, b in zip(found, expected, strict=True):
        assert oracle.error(a, b) <= torch.finfo(torch.bfloat16).eps * oracle.largest(b)
