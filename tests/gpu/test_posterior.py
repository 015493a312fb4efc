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


# The bounds of these are those of tests/test_posterior.py.


@pytest.mark.parametrize("rows", [5, 33, 70])  # in registers, padded, and beyond
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-1])
def test_kl_of_small_steps_keeps_its_digits(kernels, size, precision, rows):
    exact = problem(2, 20, 0, rows, 6)
    weights = size * exact.weights
    exact = exact._replace(weights=weights, values=weights @ exact.state.mean)
    p = map_tensors(exact, lambda x: x.float() if x.is_floating_point() else x)
    truth = oracle.flat(oracle.call("update_posterior", exact, "reference"))["kl"]
    got = kernels.call("update_posterior", p, precision=precision)["kl"]
    assert (got >= 0).all()
    eps = torch.finfo(torch.float32).eps
    # A product with codes is rounded to float32, which is a surprise of eps ‖z‖ and three roundings more as tf32x3.
    surprise = (4 * eps * rows) ** 2 * exact.values.square().sum(-1) / exact.noise_var
    assert ((got.double() - truth).abs() <= 4 * (rows + 20) * eps * truth + surprise).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_kl_of_masked_patterns_is_zero(kernels, precision):
    p = problem(2, 20, 0, 7, 6, torch.float32, masked=True)
    assert (kernels.call("update_posterior", p, precision=precision)["kl"][~p.mask] == 0).all()


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_gradient_of_a_small_step_keeps_its_digits(kernels, size, rows):
    p = problem(2, 20, 0, rows, 5)

    def gradients(p, backend):
        leaves = [x.detach().requires_grad_() for x in (p.state.cov, p.weights, p.noise_var)]
        state = (torch.zeros_like(p.state.mean), leaves[0])
        kl = update_posterior(state, leaves[1], torch.zeros_like(p.values), leaves[2], backend=backend).kl
        to_cov, *rest = (x.cpu() for x in torch.autograd.grad(kl.sum(), leaves))
        return to_cov + to_cov.mT, *rest  # only the symmetric part is defined

    p = p._replace(weights=size * p.weights)
    exact = gradients(p, "reference")
    rounded = kernels.put(map_tensors(p, lambda x: x.float() if x.is_floating_point() else x))
    for name, mine, truth in zip(
        ("cov", "weights", "noise_var"), gradients(rounded, kernels.backend), exact, strict=True
    ):
        bound = 8 * (rows + 20) * torch.finfo(torch.float32).eps * oracle.largest(truth)
        assert oracle.error(mine, truth) <= bound, f"{name}: {oracle.error(mine, truth):.3g} exceeds {bound:.3g}"


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_covariance_is_held_or_refused(kernels, precision, rows):
    """As on the CPU: wᵀUw/σ² of 1/(512 eps) is held, and of 2/eps it is refused."""
    eps = torch.finfo(torch.float32).eps
    mean, cov = torch.zeros(2, rows, 2), torch.eye(rows).repeat(2, 1, 1)
    weights = torch.zeros(2, 17, rows)
    weights[1, :, 0] = 1
    p = kernels.put((mean, cov, weights, torch.zeros(2, 17, 2)))
    after = update_posterior(p[:2], *p[2:], 512 * eps, precision=precision, backend=kernels.backend).state
    assert (after.cov.diagonal(dim1=1, dim2=2) > 0).all()
    with pytest.raises(torch.linalg.LinAlgError, match=r"new covariance is lost to rounding in memory \[1\]"):
        update_posterior(p[:2], *p[2:], eps / 2, precision=precision, backend=kernels.backend)
