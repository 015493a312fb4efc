"""update_posterior: four ways to one posterior, and what a posterior must satisfy."""

from decimal import Decimal, localcontext

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import EMPTY_SHAPES, SHAPES, assert_close, assert_result, batched, problem

from fastkm import MemoryState, kl_memory, update_posterior
from fastkm.posterior.reference import update_sequential

FLOAT64 = torch.float64


def everything_written(p):
    return torch.ones(p.weights.shape[:2], dtype=torch.bool) if p.mask is None else p.mask


def truth(p, of=oracle.update):
    return batched(of, *p.state, p.weights, p.values, p.noise_var, everything_written(p))


def update(p, backend, **changes):
    p = p._replace(**changes)
    return update_posterior(p.state, p.weights, p.values, p.noise_var, mask=p.mask, backend=backend)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update_equals_one_rank_one_step_per_pattern(shape, masked, backend, dtype):
    p = problem(*shape, dtype, masked=masked)
    oracle.judge(update, p, truth(p), backend)


@given(
    sizes=st.tuples(*[st.integers(0, n) for n in (3, 20, 20, 20)]),
    masked=st.booleans(),
    layout=st.sampled_from(oracle.LAYOUTS),
    seed=st.integers(0, 99),
)
def test_update_of_any_shape_and_layout(sizes, masked, layout, seed, backend):
    B, T, K, C = sizes
    p = problem(B, T, 0, K, C, seed=seed, masked=masked)
    if B:
        assert_result(update(oracle.map_tensors(p, lambda x: oracle.poisoned(x, layout)), backend), truth(p))
    else:
        assert update(p, backend).state.mean.shape == (0, K, C)


@pytest.mark.parametrize("shape", [(2, 9, 1, 5, 7), (2, 20, 1, 6, 3), (1, 40, 1, 33, 12)], ids=str)
def test_sequential_block_gram_space_and_normal_equations_agree(shape, backend):
    """The Gram-space form shares this test through test_writing, where its weights come from."""
    p = problem(*shape, masked=True)
    block = update(p, backend)
    assert_result(block, truth(p, oracle.normal_equations))
    kept = torch.where(p.mask.unsqueeze(-1), p.weights, 0)
    mean, cov, innovation_var = update_sequential(*p.state, kept, p.values, p.noise_var)
    assert_close(block.state.mean, mean, "mean")
    assert_close(block.state.cov, cov, "cov")
    assert_close(block.innovation_var, innovation_var, "innovation_var")


def test_two_segments_are_the_whole(backend, dtype):
    p = problem(3, 25, 0, 9, 6, dtype)
    whole = update(p, backend)
    for cut in (0, 1, 12, 25):
        first = update_posterior(p.state, p.weights[:, :cut], p.values[:, :cut], p.noise_var[:, :cut], backend=backend)
        rest = update_posterior(
            first.state, p.weights[:, cut:], p.values[:, cut:], p.noise_var[:, cut:], backend=backend
        )
        assert_close(rest.state.mean, whole.state.mean, "mean")
        assert_close(rest.state.cov, whole.state.cov, "cov")
        assert_close(torch.cat([first.kl, rest.kl], 1), whole.kl, "kl")
        assert_close(first.log_evidence + rest.log_evidence, whole.log_evidence, "log_evidence")


def test_forgetting_in_information_form_undoes_the_update(backend):
    """Λ' − WᵀW/σ² and η' − WᵀZ/σ² lead back to the memory before."""
    p = problem(3, 4, 0, 7, 5)
    after = update(p, backend).state
    for b in range(3):
        mean, cov, W, Z = (x[b].numpy() for x in (*after, p.weights, p.values))
        gram = W.T / p.noise_var[b].numpy()
        precision = np.linalg.inv(cov)
        before = np.linalg.inv(precision - gram @ W)
        assert_close(torch.from_numpy(before), p.state.cov[b], "cov")
        assert_close(torch.from_numpy(before @ (precision @ mean - gram @ Z)), p.state.mean[b], "mean")


def test_order_of_patterns_does_not_change_the_posterior(backend, dtype):
    p = problem(2, 21, 0, 10, 6, dtype)
    order = torch.randperm(21)
    shuffled = update(
        p, backend, weights=p.weights[:, order], values=p.values[:, order], noise_var=p.noise_var[:, order]
    )
    forward = update(p, backend)
    assert_close(shuffled.state.mean, forward.state.mean, "mean")
    assert_close(shuffled.state.cov, forward.state.cov, "cov")
    assert_close(shuffled.log_evidence, forward.log_evidence, "log_evidence")


def test_covariance_shrinks_and_stays_symmetric_positive_definite(backend, dtype):
    p = problem(4, 60, 0, 13, 5, dtype)
    result = update(p, backend)
    cov, prior = result.state.cov.double(), p.state.cov.double()
    rounding = oracle.ROUNDINGS * torch.finfo(dtype).eps * prior.abs().max()
    assert_close(result.state.cov, result.state.cov.mT.double(), "symmetry")
    assert torch.linalg.eigvalsh((cov + cov.mT) / 2).min() > 0
    assert torch.linalg.eigvalsh(prior - (cov + cov.mT) / 2).min() > -rounding
    assert (result.innovation_var >= p.noise_var).all()


def test_sum_of_steps_is_the_log_evidence_of_the_episode(backend):
    """Every column of Z is N(W R[:, c], W U Wᵀ + diag σ²) under the prior predictive."""
    p = problem(3, 12, 0, 7, 5)
    predictive = torch.distributions.MultivariateNormal(
        (p.weights @ p.state.mean).mT, (p.weights @ p.state.cov @ p.weights.mT + torch.diag_embed(p.noise_var))[:, None]
    )
    assert_close(update(p, backend).log_evidence, predictive.log_prob(p.values.mT).sum(-1))


def test_kl_of_every_step_is_the_kl_of_two_memories(backend):
    p = problem(2, 6, 0, 5, 4)
    result = update(p, backend)
    for b in range(2):
        R, U, W, Z, noise = (x[b].numpy() for x in (*p.state, p.weights, p.values, p.noise_var))
        for t in range(6):
            R1, U1, *_ = oracle.rank_one(R, U, W[t], Z[t], noise[t])
            # The closed form subtracts K·C from traces of that size, so its rounding is measured against K·C.
            gap = abs(result.kl[b, t].item() - oracle.kl_columns(R1, U1, R, U))
            assert gap <= 1e-12 * max(U.shape[0] * R.shape[1], result.kl[b, t].item())
            R, U = R1, U1


def test_masked_pattern_is_an_absent_pattern(backend, dtype):
    p = problem(3, 11, 0, 6, 5, dtype)
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    masked = update(p, backend, mask=keep.expand(3, 11))
    absent = update(p, backend, weights=p.weights[:, keep], values=p.values[:, keep], noise_var=p.noise_var[:, keep])
    assert_close(masked.state.mean, absent.state.mean, "mean")
    assert_close(masked.state.cov, absent.state.cov, "cov")
    assert_close(masked.log_evidence, absent.log_evidence, "log_evidence")
    assert_close(masked.kl[:, keep], absent.kl, "kl")
    assert_close(masked.innovation_var[:, keep], absent.innovation_var, "innovation_var")
    eps = torch.finfo(dtype).eps
    assert oracle.error(masked.innovation_var[:, ~keep], p.noise_var[:, ~keep]) <= 2 * eps * p.noise_var.max()
    assert oracle.largest(masked.kl[:, ~keep]) <= 2 * eps * p.values.shape[-1]


def test_what_a_masked_pattern_holds_is_never_read(backend, dtype):
    p = problem(3, 11, 0, 6, 5, dtype, masked=True)
    hidden = ~p.mask.unsqueeze(-1)
    nan = update(p, backend, weights=p.weights.masked_fill(hidden, np.nan), values=p.values.masked_fill(hidden, np.nan))
    assert oracle.equal(nan, update(p, backend))
    assert all(x.isfinite().all() for x in oracle.flat(nan).values())


def test_nothing_written_is_nothing_changed(backend, dtype):
    p = problem(3, 7, 0, 6, 5, dtype)
    for nothing in (
        update(p, backend, mask=torch.zeros(3, 7, dtype=torch.bool)),
        update(p, backend, weights=p.weights[:, :0], values=p.values[:, :0], noise_var=p.noise_var[:, :0]),
    ):
        assert torch.equal(nothing.state.mean, p.state.mean)
        assert torch.equal(nothing.state.cov, p.state.cov)
        assert torch.equal(nothing.log_evidence, torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("form", ["float", "0-d", "B", "BT"])
def test_noise_may_be_given_in_four_forms(form, backend, dtype):
    p = problem(3, 5, 0, 6, 4, dtype)
    full = torch.full((3, 5), 0.75, dtype=dtype)
    given_as = {"float": 0.75, "0-d": full[0, 0], "B": full[:, 0], "BT": full}
    assert oracle.equal(update(p, backend, noise_var=given_as[form]), update(p, backend, noise_var=full))


def test_noise_per_memory_belongs_to_its_memory(backend, dtype):
    p = problem(3, 5, 0, 6, 4, dtype)
    per_memory = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    spread = update(p, backend, noise_var=per_memory.unsqueeze(-1).expand(3, 5))
    assert oracle.equal(update(p, backend, noise_var=per_memory), spread)


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty_axes(shape, backend, dtype):
    B, T, _, K, C = shape
    p = problem(*shape, dtype)
    result = update(p, backend)
    got = {name: tuple(x.shape) for name, x in oracle.flat(result).items()}
    assert got == {"mean": (B, K, C), "cov": (B, K, K), "innovation_var": (B, T), "kl": (B, T), "log_evidence": (B,)}
    if B:
        assert_result(result, truth(p))


def test_state_can_be_any_pair(backend):
    p = problem(2, 3, 0, 4, 5)
    pair = tuple(p.state)
    result = update(p, backend, state=pair)
    assert isinstance(result.state, MemoryState)
    assert oracle.equal(result, update(p, backend))


# ---- small steps: what a pattern says can be far below the rounding of its variances -------------------------------


def divergence_of_step(x: float) -> float:
    """log1p(x) − x/(1 + x), to a hundred digits."""
    with localcontext() as context:
        context.prec = 100
        step = Decimal(x)
        return float((1 + step).ln() - step / (1 + step))


@pytest.mark.parametrize("noise", [1.0, 0.125])
def test_kl_of_a_step_has_its_digits_whatever_its_size(noise, backend, dtype):
    """One row, values on the mean: KL = C/2 (log1p(x) − x/(1 + x)), x = w²U/σ².

    The kernel's x has three roundings, which the divergence, about x²/2, doubles. Its own sum has ten more.
    """
    eps, C = torch.finfo(dtype).eps, 5
    sizes = 10.0 ** torch.arange(-12 if dtype == torch.float32 else -30, 4.5, 0.25, dtype=FLOAT64)
    w = (sizes * noise).sqrt().to(dtype).view(-1, 1, 1)
    state = MemoryState(torch.zeros(len(w), 1, C, dtype=dtype), torch.ones(len(w), 1, 1, dtype=dtype))
    result = update_posterior(state, w, torch.zeros(len(w), 1, C, dtype=dtype), noise, backend=backend)
    for kl, weight in zip(result.kl.flatten().tolist(), w.flatten().tolist(), strict=True):
        expected = C / 2 * divergence_of_step(weight**2 / noise)
        assert abs(kl - expected) <= 16 * eps * expected, f"x = {weight**2 / noise:.3g}: {kl:.9g} for {expected:.9g}"


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-1])
def test_kl_of_small_steps_of_many_patterns(size, backend):
    """float32 against float64. The kernel's wᵀUw is a sum of K² terms that are eliminated at most t times."""
    p = problem(3, 20, 0, 9, 6)
    p = p._replace(weights=size * p.weights)
    p = p._replace(values=p.weights @ p.state.mean)  # no surprise: only the covariance tells what was learnt
    exact = update(p, backend).kl
    got = update(oracle.map_tensors(p, lambda x: x.float() if x.is_floating_point() else x), backend).kl
    # The values are rounded to float32, which is a surprise of eps ‖z‖: β ‖E‖² is as small as eps² times the energy.
    bound = 4 * (9 + 20) * torch.finfo(torch.float32).eps * exact
    surprise = (torch.finfo(torch.float32).eps * 9) ** 2 * p.values.square().sum(-1) / p.noise_var
    assert ((got.double() - exact).abs() <= bound + surprise).all()


@given(size=st.floats(1e-12, 30), masked=st.booleans(), seed=st.integers(0, 99))
def test_kl_of_a_step_is_never_negative(size, masked, seed, backend, dtype):
    p = problem(4, 18, 0, 5, 3, dtype, seed=seed, masked=masked)
    result = update(p, backend, weights=size * p.weights, values=size * p.weights @ p.state.mean)
    assert (result.kl >= 0).all()
    if masked:
        assert torch.equal(result.kl[~p.mask], torch.zeros_like(result.kl[~p.mask]))


def gradients_of_kl(p, backend):
    leaves = [x.detach().requires_grad_() for x in (p.state.cov, p.weights, p.noise_var)]
    kl = update_posterior(
        MemoryState(p.state.mean, leaves[0]), leaves[1], p.weights @ p.state.mean, leaves[2], backend=backend
    ).kl
    to_cov, *rest = torch.autograd.grad(kl.sum(), leaves)
    return to_cov + to_cov.mT, *rest  # only the symmetric part is defined


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_gradient_of_a_small_step_keeps_its_digits(size, backend):
    """d/dx (log1p(x) − x/(1 + x)) = x/(1 + x)²: what reaches σ² is of the size x², of what reaches S of the size x."""
    p = problem(2, 20, 0, 7, 5)
    state = MemoryState(torch.zeros_like(p.state.mean), p.state.cov)  # no energy, whatever is rounded
    p = p._replace(state=state, weights=size * p.weights)
    exact = gradients_of_kl(p, backend)
    got = gradients_of_kl(oracle.map_tensors(p, lambda x: x.float() if x.is_floating_point() else x), backend)
    for name, mine, truth in zip(("cov", "weights", "noise_var"), got, exact, strict=True):
        # Each is a sum over the patterns, K² terms each, which the reverse sweep passes through twice.
        bound = 8 * (7 + 20) * torch.finfo(torch.float32).eps * oracle.largest(truth)
        assert oracle.error(mine, truth) <= bound, f"{name}: {oracle.error(mine, truth):.3g} of {bound:.3g}"


# ---- little noise: a covariance is held, or refused where it is made -----------------------------------------------


@given(
    exponent=st.floats(-12, 0),
    count=st.sampled_from([1, 3, 16, 40]),
    kind=st.sampled_from(["random", "repeated", "one row"]),
    seed=st.integers(0, 99),
)
def test_a_covariance_that_is_returned_can_be_factored(exponent, count, kind, seed, backend):
    p = problem(1, count, 0, 8, 4, torch.float32, seed=seed)
    weights = p.weights
    if kind == "repeated":
        weights = weights[:, :1].expand(-1, count, -1)
    if kind == "one row":
        weights = torch.eye(8)[:1].expand(1, count, -1)
    state = MemoryState(p.state.mean, torch.eye(8)[None])
    words = ""
    try:
        after = update_posterior(state, weights, p.values, 10**exponent, backend=backend).state
    except torch.linalg.LinAlgError as error:
        words = str(error)
    if words:
        assert "float64" in words
        return
    assert (after.cov.diagonal(dim1=1, dim2=2) > 0).all()
    assert kl_memory(after, state, backend=backend).isfinite().all()


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_the_range_that_is_documented(count, backend, dtype):
    """wᵀUw/σ² up to 1/(512 eps), 1.6e4 in float32: a chunk of 16 such patterns leaves 1/16 of that, 32 eps."""
    x = 1 / (512 * torch.finfo(dtype).eps)
    state = MemoryState(torch.zeros(1, 3, 2, dtype=dtype), torch.eye(3, dtype=dtype)[None])
    weights = torch.eye(3, dtype=dtype)[:1].expand(1, count, 3)
    after = update_posterior(state, weights, torch.zeros(1, count, 2, dtype=dtype), 1 / x, backend=backend).state
    # 16 terms of GᵀG, each rounded at the size of 1, against 1/(1 + count x); later chunks only shrink the error.
    left = 1 / (1 + count * x)
    assert abs(after.cov[0, 0, 0].item() - left) <= 16 * torch.finfo(dtype).eps * min(1.0, (16 / count) ** 2)


def test_a_thousandfold_of_that_range_is_refused(backend, dtype):
    x = 2 / torch.finfo(dtype).eps
    state = MemoryState(torch.zeros(2, 3, 2, dtype=dtype), torch.eye(3, dtype=dtype).repeat(2, 1, 1))
    weights = torch.stack([torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype)])
    with pytest.raises(torch.linalg.LinAlgError, match=r"memory \[1\].*noise"):
        update_posterior(state, weights, torch.zeros(2, 1, 2, dtype=dtype), 1 / x, backend=backend)
