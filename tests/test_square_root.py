"""update_square_root: Potter's steps, the posterior, LAPACK's QR, and no noise that is too small."""

import oracle
import pytest
import torch
from oracle import EMPTY_SHAPES, SHAPES, problem

import fastkm
from fastkm import MemoryState, SquareRootState, from_square_root, to_square_root, update_square_root
from fastkm._runtime import schema

NATIVE_MISSING = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
LARGE_SHAPES = [(2, 65, 1, 40, 30), (1, 70, 1, 200, 600)]


def error(got, truth):
    """The largest error of a pair of tensors, each relative to its largest entry."""
    return max(
        (float((x.double() - y).abs().max() / y.abs().max()) for x, y in zip(got, truth, strict=True) if y.numel()),
        default=0.0,
    )


def update(p, backend, state=None):
    state = state or to_square_root(p.state)
    return update_square_root(state, p.weights, p.values, p.noise_var, mask=p.mask, backend=backend)


@pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES + EMPTY_SHAPES, ids=str)
def test_the_forms_are_inverse_to_each_other(shape, dtype):
    state = problem(*shape, dtype).state
    back = from_square_root(to_square_root(state))
    assert torch.equal(back.cov, back.cov.mT)
    assert error(back, [x.double() for x in state]) <= 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES + EMPTY_SHAPES, ids=str)
def test_it_is_the_update_of_the_covariance(shape, masked, backend):
    p = problem(*shape, masked=masked)
    want = fastkm.update_posterior(p.state, p.weights, p.values, p.noise_var, mask=p.mask, backend="reference").state
    assert error(from_square_root(update(p, backend)), want) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES, ids=str)
def test_a_float32_root_is_as_exact_as_the_steps(shape, backend):
    p = problem(*shape, torch.float32, masked=True)
    exact = oracle.map_tensors(p, lambda x: x.double() if x.is_floating_point() else x)
    truth = update(exact, "reference")._asdict()
    oracle.judge(lambda p, backend: update(p, backend), p, truth, backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_root_will_do(shape, backend):
    """A root that is not triangular, and one with a column of zeros, are updated as well."""
    p = problem(*shape)
    turn = torch.linalg.qr(torch.randn(p.state.cov.shape, dtype=torch.float64)).Q
    start = to_square_root(p.state)
    turned = SquareRootState(start.mean, start.root @ turn)
    assert error(from_square_root(update(p, backend, turned)), from_square_root(update(p, backend))) <= 1e-12
    flat = SquareRootState(start.mean, torch.zeros_like(start.root))
    assert oracle.equal(update(p, backend, flat), flat)


def test_it_equals_lapacks_reflections(backend):
    p = problem(3, 9, 1, 13, 6)
    start = to_square_root(p.state)
    array = torch.cat((torch.diag_embed(p.noise_var.sqrt()), (p.weights @ start.root).mT), 1)
    reflections = torch.linalg.qr(array, "complete").Q[:, 9:, 9:]
    assert error([update(p, backend).root], [start.root @ reflections]) <= 1e-12


@pytest.mark.parametrize("noise", [1e-2, 1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("patterns", [16, 512])
def test_no_noise_is_too_small_in_float32(noise, patterns, backend):
    """Where the moment form is indefinite from 1e-6 on. The error is measured against float64 of the same inputs."""
    generator = torch.Generator().manual_seed(0)
    K, C = 32, 20
    weights = torch.randn(1, patterns, K, generator=generator) / K**0.5
    values = weights @ torch.randn(1, K, C, generator=generator)
    state = SquareRootState(torch.zeros(1, K, C), torch.eye(K).unsqueeze(0))
    got = update_square_root(state, weights, values, noise, backend=backend)
    exact = SquareRootState(*(x.double() for x in state))
    want = update_square_root(exact, weights.double(), values.double(), noise, backend="reference")
    assert all(x.isfinite().all() for x in got)
    # A root is rounded once a chunk, by its own size; the next chunks shrink it to √σ².
    allowed = 64 * torch.finfo(torch.float32).eps / noise**0.5
    assert error([got.root.double() @ got.root.double().mT], [want.root @ want.root.mT]) <= max(allowed, 1e-5)
    if patterns < K:  # with more, the noise that rounds the values is larger than σ²
        assert error([got.mean], [want.mean]) <= 1e-5 if noise > 1e-10 else True


@NATIVE_MISSING
@pytest.mark.parametrize("shape", [(7, 33, 1, 33, 17), (1, 70, 1, 200, 600)], ids=str)
def test_threads_and_neighbours_change_no_bit(shape, dtype):
    p = problem(*shape, dtype, masked=True)
    root = to_square_root(p.state)  # once: a factor of PyTorch depends on the number of threads
    one = update(p, "native", root)
    torch.set_num_threads(3)
    assert oracle.equal(one, update(p, "native", root))
    torch.set_num_threads(1)
    alone = update(oracle.map_tensors(p, lambda x: x[:1]), "native", SquareRootState(*(x[:1] for x in root)))
    assert all(torch.equal(x[:1], y) for x, y in zip(one, alone, strict=True))


def test_autocast_rounds_no_conversion():
    state = problem(2, 1, 1, 9, 5, torch.float32).state
    root, sums = to_square_root(state), fastkm.to_information(state)
    with torch.autocast("cpu", torch.bfloat16):
        inside = (
            from_square_root(root),
            to_square_root(state),
            fastkm.from_information(sums),
            fastkm.to_information(state),
        )
    outside = (
        from_square_root(root),
        to_square_root(state),
        fastkm.from_information(sums),
        fastkm.to_information(state),
    )
    assert all(oracle.equal(x, y) for x, y in zip(inside, outside, strict=True))


def test_what_is_refused(backend):
    p = problem(3, 3, 1, 4, 5)
    start = to_square_root(p.state)
    sick = start.root.clone()
    sick[1, 0, 0] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError, match=r"^square_root_state.root is not finite in memory \[1\]$"):
        update(p, backend, SquareRootState(start.mean, sick))
    with pytest.raises(ValueError, match=r"^square_root_state.root must have shape \[B, K, K\] = \[3, 4, 4\]"):
        update(p, backend, SquareRootState(start.mean, start.root[..., :3]))
    with pytest.raises(TypeError, match=r"^square_root_state must be a SquareRootState\(mean, root\), got int"):
        update(p, backend, 3)
    with pytest.raises(ValueError, match=r"^noise_var must be positive"):
        update_square_root(start, p.weights, p.values, -1.0, backend=backend)
    cov = p.state.cov.clone()
    cov[2] *= -1
    with pytest.raises(torch.linalg.LinAlgError, match=r"^state.cov is not positive definite in memory \[2\]$"):
        to_square_root(MemoryState(p.state.mean, cov))


def test_overflow_is_refused(backend):
    """The infinite variance would leave the memory as it is, in silence."""
    root = torch.eye(3) * torch.tensor([1.0, 1e30]).view(2, 1, 1)
    state = SquareRootState(torch.zeros(2, 3, 2), root)
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"^the new memory is beyond the range of its dtype in memory \[1\]$"
    ):
        update_square_root(state, torch.ones(2, 4, 3), torch.ones(2, 4, 2), 1.0, backend=backend)
