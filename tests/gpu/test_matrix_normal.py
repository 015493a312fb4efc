"""kl_memory and logdet on the GPU kernels."""

import oracle
import pytest
import torch
from oracle import batched, poisoned, problem

from fastkm import MemoryState, kl_memory
from fastkm.matrix_normal import logdet
from gpu.support import SHAPES


def kl_truth(p):
    return batched(lambda R, U: {"kl_memory": oracle.kl_columns(R, U, 0.5 * R, 1.5 * U)}, *p.state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_is_the_sum_over_columns(kernels, shape):
    p = problem(*shape, torch.float32)
    kernels.judge("kl_memory", p, kl_truth(p))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logdet(kernels, shape):
    p = problem(*shape, torch.float32)
    kernels.judge("logdet", p, {"logdet": torch.linalg.slogdet(p.state.cov.double())[1]})


@pytest.mark.parametrize("operation", ["kl_memory", "logdet"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_gradients(kernels, operation, shape):
    kernels.judge_gradient(operation, problem(*shape, torch.float32))


def test_a_covariance_that_is_none_is_named(kernels):
    mean, cov = kernels.put(problem(3, 1, 1, 5, 4, torch.float32).state)
    asymmetric, indefinite = cov.clone(), cov.clone()
    asymmetric[1, 0, 2] += 1
    indefinite[2] = -indefinite[2]
    with pytest.raises(torch.linalg.LinAlgError, match=r"not symmetric in memory \[1\]"):
        logdet(asymmetric, backend=kernels.backend)
    good, bad = MemoryState(mean, cov), MemoryState(mean, indefinite)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite in memory \[2\]"):
            kl_memory(*pair, backend=kernels.backend)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layout_means_nothing(kernels, layout):
    p = problem(3, 1, 1, 7, 6, torch.float32)
    assert oracle.equal(
        *(kl_memory(MemoryState(*kernels.put(s)), MemoryState(*kernels.put(s)), backend=kernels.backend)
          for s in (p.state, tuple(poisoned(x, layout) for x in p.state)))
    )  # fmt: skip


def test_each_memory_alone_is_the_memory_in_the_batch(kernels):
    p = problem(3, 1, 1, 7, 6, torch.float32)
    together = kernels.call("kl_memory", p)["kl_memory"]
    for b in range(3):
        alone = kernels.call("kl_memory", p._replace(state=MemoryState(*(x[b : b + 1] for x in p.state))))
        assert torch.equal(alone["kl_memory"], together[b : b + 1])


@pytest.mark.parametrize("shape", [(0, 1, 1, 4, 5), (2, 1, 1, 0, 5), (2, 1, 1, 4, 0)], ids=str)
def test_empty_axes(kernels, shape):
    p = problem(*shape, torch.float32)
    oracle.assert_close(
        kernels.call("kl_memory", p)["kl_memory"], kernels.call("kl_memory", p, "reference")["kl_memory"]
    )


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_kl_of_nearly_equal_memories(kernels, rows, size):
    """The bound is that of tests/test_matrix_normal.py."""
    torch.manual_seed(rows)
    columns, condition = 5, 4.0
    cov = torch.eye(rows) + (condition - 1) / rows * torch.ones(rows, rows)
    prior = MemoryState(torch.randn(3, rows, columns), cov.expand(3, -1, -1).contiguous())
    change = torch.eye(rows) + size * torch.randn(3, rows, rows)
    state = MemoryState(prior.mean, (change @ prior.cov @ change.mT) if size else prior.cov)
    state = state._replace(cov=(state.cov + state.cov.mT) / 2)
    exact = kl_memory(*(MemoryState(*(x.double() for x in law)) for law in (state, prior)), backend="reference")
    got = kl_memory(*kernels.put((state, prior)), backend=kernels.backend).cpu()
    assert (got >= 0).all()
    assert size or (got == 0).all()
    bound = 2 * columns**0.5 * rows * (rows + 1) * torch.finfo(torch.float32).eps * condition
    assert ((got.double().sqrt() - exact.sqrt()).abs() <= bound).all()
