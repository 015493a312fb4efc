"""update_posterior on the GPU kernels: the state in registers, split over columns, and in block form."""

import numpy as np
import oracle
import pytest
import torch
from oracle import batched, map_tensors, poisoned, problem

from fastkm import update_posterior
from gpu.support import SHAPES

PRECISIONS = ["ieee", "tf32x3"]  # one pattern after the other, and the block form


def truth(p):
    written = torch.ones(p.weights.shape[:2], dtype=torch.bool) if p.mask is None else p.mask
    return batched(oracle.update, *p.state, p.weights, p.values, p.noise_var, written)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update_equals_one_rank_one_step_per_pattern(kernels, shape, masked):
    p = problem(*shape, torch.float32, masked=masked)
    kernels.judge("update_posterior", p, truth(p))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_block_form_equals_it_too(kernels, shape):
    p = problem(*shape, torch.float32, masked=True)
    kernels.judge("update_posterior", p, truth(p), precision="tf32x3")


def test_tf32_is_as_coarse_as_it_says_and_leaves_the_covariance_exact(kernels):
    p = problem(2, 17, 3, 40, 70, torch.float32)
    exact, coarse = (kernels.call("update_posterior", p, precision=precision) for precision in ("ieee", "tf32"))
    assert 1e-5 < oracle.error(coarse["mean"], exact["mean"]) / oracle.largest(exact["mean"]) < 1e-2
    oracle.assert_close(coarse["cov"], exact["cov"].double(), "cov")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_gradients(kernels, shape, masked):
    kernels.judge_gradient("update_posterior", problem(*shape, torch.float32, masked=masked))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_segments_are_the_whole(kernels, precision):
    p = kernels.put(problem(2, 20, 0, 9, 6, torch.float32))

    def update(state, part):
        return update_posterior(
            state, p.weights[:, part], p.values[:, part], p.noise_var[:, part],
            precision=precision, backend=kernels.backend,
        )  # fmt: skip

    whole, first = update(p.state, slice(None)), update(p.state, slice(0, 7))
    rest = update(first.state, slice(7, None))
    oracle.assert_close(rest.state.mean, whole.state.mean.double(), "mean")
    oracle.assert_close(rest.state.cov, whole.state.cov.double(), "cov")
    oracle.assert_close(torch.cat([first.kl, rest.kl], 1), whole.kl.double(), "kl", scale=6)
    oracle.assert_close(first.log_evidence + rest.log_evidence, whole.log_evidence.double(), "log_evidence")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_memory_alone_is_the_memory_in_the_batch(kernels, precision):
    p = problem(3, 5, 0, 7, 6, torch.float32, masked=True)
    together = kernels.call("update_posterior", p, precision=precision)
    alone = kernels.call("update_posterior", map_tensors(p, lambda x: x[1:2]), precision=precision)
    assert all(torch.equal(alone[name], together[name][1:2]) for name in alone)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layout_means_nothing(kernels, layout, precision):
    p = problem(2, 5, 0, 7, 6, torch.float32, masked=True)
    plain, hostile = (
        kernels.call("update_posterior", q, precision=precision)
        for q in (p, map_tensors(p, lambda x: poisoned(x, layout)))
    )
    assert all(torch.equal(plain[name], hostile[name]) for name in plain)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_masked_pattern_holds_is_never_read(kernels, precision):
    p = problem(3, 5, 0, 6, 5, torch.float32, masked=True)
    masked = ~p.mask.unsqueeze(-1)
    q = p._replace(weights=p.weights.masked_fill(masked, np.nan), values=p.values.masked_fill(masked, np.nan))
    plain, hostile = (kernels.call("update_posterior", x, precision=precision) for x in (p, q))
    assert all(torch.equal(plain[name], hostile[name]) for name in plain)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_low_precision_codes_are_read_as_they_are(kernels, low, precision):
    p = problem(2, 5, 0, 7, 6, torch.float32)
    q = p._replace(weights=p.weights.to(low), values=p.values.to(low))
    low_, wide = (
        kernels.call("update_posterior", x, precision=precision)
        for x in (q, q._replace(weights=q.weights.float(), values=q.values.float()))
    )
    assert all(torch.equal(low_[name], wide[name]) for name in wide)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_covariance_that_is_none_is_named(kernels, precision):
    p = kernels.put(problem(3, 6, 0, 5, 4, torch.float32))
    for change, words in (
        (lambda cov: cov[1, 0].add_(1), r"not symmetric in memory \[1\]"),
        (lambda cov: cov[2].neg_(), r"not positive definite in memory \[2\]"),
    ):
        cov = p.state.cov.clone()
        change(cov)
        with pytest.raises(torch.linalg.LinAlgError, match=words):
            update_posterior(
                (p.state.mean, cov), p.weights, p.values, p.noise_var, precision=precision, backend=kernels.backend
            )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", oracle.EMPTY_SHAPES, ids=str)
def test_empty_axes(kernels, shape, precision):
    p = problem(*shape, torch.float32)
    expected = kernels.call("update_posterior", p, "reference")
    for name, x in kernels.call("update_posterior", p, precision=precision).items():
        oracle.assert_close(x, expected[name].double(), name, scale=5.0 if name == "kl" else 0.0)
