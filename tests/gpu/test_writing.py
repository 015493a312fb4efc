"""write on the GPU kernels: one solve for each pattern, and solves that refactor."""

import functools

import numpy as np
import oracle
import pytest
import torch
from oracle import batched, map_tensors, poisoned, problem

from fastkm import write
from gpu.support import SHAPES

WAYS = [{}, {"num_opt_iters": 2}, {"method": "deepmind"}]
# Refactoring for every solve is slow, so it gets one memory of more than a chunk of patterns and a tile of columns.
WRITES = [(shape, {}, masked) for shape in SHAPES for masked in (False, True)]
WRITES += [(shape, way, masked) for shape in SHAPES[:2] for way in WAYS[1:] for masked in (False, True)]
WRITES += [((1, 17, 0, 18, 33), way, True) for way in WAYS[1:]]


def truth(p, num_opt_iters=1, method="ridge"):
    written = torch.ones(p.values.shape[:2], dtype=torch.bool) if p.mask is None else p.mask
    one = functools.partial(oracle.write, num_opt_iters=num_opt_iters, squared=method == "deepmind")
    return batched(one, *p.state, p.values, p.noise_var, p.ridge, written)


@pytest.mark.parametrize(("shape", "way", "masked"), WRITES, ids=str)
def test_each_pattern_is_addressed_then_stored(kernels, shape, way, masked):
    p = problem(*shape, torch.float32, masked=masked)
    kernels.judge("write", p, truth(p, **way), **way)


def test_a_long_episode_stays_accurate(kernels):
    p = problem(8, 70, 0, 17, 9, torch.float32)
    kernels.judge("write", p, truth(p), draws=8, times={"weights": 3})


@pytest.mark.parametrize(
    ("shape", "way"),
    [
        ((3, 9, 4, 5, 7), {}),
        *(((2, 6, 4, 5, 7), way) for way in (*WAYS[1:], {"num_opt_iters": 2, "method": "deepmind"})),
        ((2, 4, 1, 40, 70), {}),
        ((2, 3, 1, 24, 40), {"num_opt_iters": 2}),
    ],
    ids=str,
)
def test_gradients(kernels, shape, way):
    kernels.judge_gradient("write", problem(*shape, torch.float32, masked=True), **way)


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_two_segments_are_the_whole(kernels, way):
    p = kernels.put(problem(2, 20, 0, 9, 6, torch.float32))

    def segment(state, part):
        return write(state, p.values[:, part], p.noise_var[:, part], p.ridge, backend=kernels.backend, **way)

    whole, first = segment(p.state, slice(None)), segment(p.state, slice(0, 7))
    rest = segment(first.state, slice(7, None))
    oracle.assert_close(rest.state.mean, whole.state.mean.double(), "mean")
    oracle.assert_close(rest.state.cov, whole.state.cov.double(), "cov")
    oracle.assert_close(torch.cat([first.weights, rest.weights], 1), whole.weights.double(), "weights")


def test_tf32_rounds_the_update_and_not_the_weights(kernels):
    p = problem(2, 16, 0, 20, 70, torch.float32)  # as many as every kernel searches for at once
    exact, close, coarse = (kernels.call("write", p, precision=x) for x in ("ieee", "tf32x3", "tf32"))
    assert torch.equal(exact["weights"], coarse["weights"])
    assert oracle.error(close["mean"], exact["mean"]) / oracle.largest(exact["mean"]) < 2e-5
    assert 1e-5 < oracle.error(coarse["mean"], exact["mean"]) / oracle.largest(exact["mean"]) < 2e-2


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_each_memory_alone_is_the_memory_in_the_batch(kernels, way):
    p = problem(3, 5, 0, 7, 6, torch.float32, masked=True)
    together = kernels.call("write", p, **way)
    alone = kernels.call("write", map_tensors(p, lambda x: x[1:2]), **way)
    assert all(torch.equal(alone[name], together[name][1:2]) for name in alone)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_layout_means_nothing(kernels, layout, way):
    p = problem(2, 5, 0, 7, 6, torch.float32, masked=True)
    plain, hostile = (
        kernels.call("write", q, **way) for q in (p, map_tensors(p, lambda x: poisoned(x, layout)))
    )  # fmt: skip
    assert all(torch.equal(plain[name], hostile[name]) for name in plain)


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_what_a_masked_pattern_holds_is_never_read(kernels, way):
    p = problem(3, 5, 0, 6, 5, torch.float32, masked=True)
    q = p._replace(values=p.values.masked_fill(~p.mask.unsqueeze(-1), np.nan))
    plain, hostile = (kernels.call("write", x, **way) for x in (p, q))
    assert all(torch.equal(plain[name], hostile[name]) for name in plain)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_values_are_read_as_they_are(kernels, low):
    p = problem(2, 5, 0, 7, 6, torch.float32)
    p = p._replace(values=p.values.to(low))
    narrow, wide = (kernels.call("write", q) for q in (p, p._replace(values=p.values.float())))
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_a_covariance_that_is_none_is_named(kernels, way):
    p = kernels.put(problem(3, 6, 0, 5, 4, torch.float32))
    for change, words in (
        (lambda cov: cov[1, 0].add_(1), r"not symmetric in memory \[1\]"),
        (lambda cov: cov[2].neg_(), r"not positive definite in memory \[2\]"),
    ):
        cov = p.state.cov.clone()
        change(cov)
        with pytest.raises(torch.linalg.LinAlgError, match=words):
            write((p.state.mean, cov), p.values, p.noise_var, p.ridge, backend=kernels.backend, **way)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("shape", oracle.EMPTY_SHAPES, ids=str)
def test_empty_axes(kernels, shape, way):
    p = problem(*shape, torch.float32)
    expected = kernels.call("write", p, "reference", **way)
    for name, x in kernels.call("write", p, **way).items():
        oracle.assert_close(x, expected[name].double(), name, scale=5.0 if name == "kl" else 0.0)


@pytest.mark.parametrize("options", [{}, {"num_opt_iters": 2}], ids=str)
@pytest.mark.parametrize("rows", [5, 40])
def test_a_weak_write_has_its_kl(kernels, rows, options):
    """A covariance of 1e-4 beside a noise of 1: the weights are those of any covariance, wᵀUw/σ² is about 1e-4."""
    p = problem(2, 20, 0, rows, 6, torch.float32)
    p = p._replace(state=p.state._replace(cov=1e-4 * torch.eye(rows).repeat(2, 1, 1)))
    got = kernels.call("write", p, **options)
    exact = map_tensors(p, lambda x: x.double() if x.is_floating_point() else x)
    truth = oracle.flat(oracle.call("write", exact, "reference", **options))
    own = kernels.call("write", p, "reference", **options)
    assert (got["kl"] >= 0).all()
    # The weights have errors of their own, which the reference has too; the KL is a form of degree two in them.
    worst = max(oracle.error(x["weights"], truth["weights"]) for x in (got, own)) / oracle.largest(truth["weights"])
    bound = (4 * worst + 4 * (rows + 20) * torch.finfo(torch.float32).eps) * oracle.largest(truth["kl"])
    assert oracle.error(got["kl"], truth["kl"]) <= bound


@pytest.mark.parametrize("options", [{}, {"num_opt_iters": 2}], ids=str)
@pytest.mark.parametrize("rows", [5, 40])
def test_a_covariance_that_would_be_lost_is_refused(kernels, rows, options):
    p = problem(2, 3, 0, rows, 50, torch.float32)
    cov = torch.eye(rows).repeat(2, 1, 1)
    p = kernels.put(p._replace(state=p.state._replace(cov=cov), noise_var=torch.full_like(p.noise_var, 1e-9)))
    with pytest.raises(torch.linalg.LinAlgError, match=r"new covariance is lost to rounding in memories \[0, 1\]"):
        oracle.call("write", p, kernels.backend, **options)
