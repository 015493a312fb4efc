"""read and attractor_read: the latent loop, the codec's loop, and the energy."""

import functools
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import EMPTY_SHAPES, SHAPES, assert_close, assert_result, batched, problem

from fastkm import attractor_read, read, solve_addressing
from fastkm._runtime import schema


def run(p, backend, **options):
    return read(p.state.mean, p.queries, p.ridge, backend=backend, **options)


def judge(p, backend, num_iters, method="ridge"):
    options = {"num_iters": num_iters, "method": method}
    exact = batched(oracle.read, p.state.mean, p.queries, p.ridge, num_iters=num_iters, squared=method == "deepmind")
    oracle.judge(lambda p, b: run(p, b, **options), p, exact, backend)


@pytest.mark.parametrize("num_iters", [1, 2, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_latent_loop_equals_the_literal_loop(shape, num_iters, backend, dtype):
    judge(problem(*shape, dtype), backend, num_iters)


@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize("shape", [(2, 1, 9, 4, 7), (2, 1, 5, 13, 6), (1, 1, 18, 9, 16)], ids=str)
def test_deepmind_solve_in_the_loop(shape, num_iters, backend, dtype):
    judge(problem(*shape, dtype), backend, num_iters, method="deepmind")


@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 20, 20, 20)]),
    layout=st.sampled_from(oracle.LAYOUTS),
    num_iters=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_read_of_any_shape_and_layout(sizes, layout, num_iters, seed, backend):
    B, Q, K, C = sizes
    p = problem(B, 0, Q, K, C, seed=seed)
    judge(oracle.map_tensors(p, lambda x: oracle.poisoned(x, layout)), backend, num_iters)


@pytest.mark.parametrize(("batch", "layout"), [(1, "displaced"), (3, "strided"), (2, "transposed")])
@pytest.mark.parametrize(("K", "C"), [(5, 40), (40, 5), (16, 16), (17, 33), (50, 31)])
def test_many_queries(K, C, batch, layout, backend, dtype):
    p = problem(batch, 0, 4 * (K + C) + 5, K, C, dtype)
    judge(oracle.map_tensors(p, lambda x: oracle.poisoned(x, layout)), backend, num_iters=3)


# Shapes whose systems a CPU kernel may solve in C: with few queries, with several tiles of them, and folded.
SHORT_CODES = [(2, 0, 5, 128, 40), (1, 0, 70, 131, 65), (1, 0, 150, 129, 1), (1, 0, 600, 140, 9)]


@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize("shape", SHORT_CODES, ids=str)
def test_memories_with_short_codes(shape, num_iters, backend, dtype):
    judge(problem(*shape, dtype), backend, num_iters)


def hard_to_read(kind, generator):
    """float32 (mean, queries, ridge): 130 rows of short codes that leave few digits to a solve in C."""
    normal = functools.partial(torch.randn, generator=generator)
    mean, queries, ridge = normal(1, 130, 24), normal(1, 5, 24), 1e-3
    if kind == "rows nearly the same":
        mean = mean[:, :1] + 1e-2 * mean
    elif kind == "queries outside the rows":
        mean = mean[:, :1] + 1e-2 * mean
        queries = queries - (queries @ mean[:, :1].mT) * mean[:, :1] / mean[:, :1].square().sum()
        ridge = mean.square().sum(1).max().item() / 5  # the system is well conditioned, and R y cancels all the same
    elif kind == "codes that repeat":
        mean = mean[..., torch.arange(24) // 2] + 1e-2 * mean
    elif kind == "a dominant ridge":
        ridge = 1e4
    return mean, queries, torch.tensor([ridge])


@pytest.mark.parametrize("num_iters", [1, 2, 10])
@pytest.mark.parametrize(
    "kind", ["rows nearly the same", "queries outside the rows", "codes that repeat", "a dominant ridge"]
)
def test_a_solve_in_codes_keeps_the_digits_of_the_literal_loop(kind, num_iters):
    """Against the literal loop in float32: the worst error of several memories, which no luck of one rounding moves."""
    worst = {"native": {}, "reference": {}}
    for seed in range(6):
        inputs = hard_to_read(kind, torch.Generator().manual_seed(seed))
        exact = read(*(x.double() for x in inputs), num_iters=num_iters, backend="reference")
        for backend, errors in worst.items():
            got = read(*inputs, num_iters=num_iters, backend=backend)
            for name in ("values", "weights"):
                truth = getattr(exact, name)
                relative = oracle.error(getattr(got, name), truth) / oracle.largest(truth)
                errors[name] = max(errors.get(name, 0), relative)
    for name, got in worst["native"].items():
        assert got <= 4 * (worst["reference"][name] + torch.finfo(torch.float32).eps), name


def test_one_read_is_address_and_decode(backend, dtype):
    p = problem(3, 0, 5, 8, 6, dtype)
    result = run(p, backend)
    weights = solve_addressing(p.state.mean, p.queries, p.ridge, backend=backend)
    assert_close(result.weights, weights, "weights")
    assert_close(result.values, weights @ p.state.mean, "values")


@pytest.mark.parametrize("num_iters", [1, 2, 40])
def test_every_mode_decays_by_its_own_factor(num_iters, backend):
    """With G = V diag(g) Vᵀ the weights are w_n = V (g/(g+λ))ⁿ⁻¹ (g+λ)⁻¹ Vᵀ R z."""
    p = problem(3, 0, 5, 6, 9)
    mean, ridge = p.state.mean, p.ridge.unsqueeze(-1)
    g, modes = torch.linalg.eigh(mean @ mean.mT)  # [B, K], [B, K, K]
    factor = (g / (g + ridge)) ** (num_iters - 1) / (g + ridge)
    weights = ((p.queries @ mean.mT @ modes) * factor.unsqueeze(1)) @ modes.mT
    first = run(p, backend).weights
    # w_n comes out of n subtractions that start at the size of w_1, which is what its rounding is measured against.
    assert oracle.error(run(p, backend, num_iters=num_iters).weights, weights) <= 1e-12 * oracle.largest(first)


def test_many_queries_of_any_number_of_iterations(backend):
    """All iterations of many queries become one matrix, whose power is found by squaring: every pattern of bits."""
    few, many = problem(2, 0, 3, 5, 9), problem(2, 0, 4 * (5 + 9) + 1, 5, 9)
    queries = torch.cat([few.queries, many.queries], 1)
    for num_iters in range(1, 18):
        alone = run(few, backend, num_iters=num_iters)
        together = run(few._replace(queries=queries), backend, num_iters=num_iters)
        # Powers and iterations round differently; both come down from weights of the size of the first.
        scale = oracle.largest(run(few, backend).weights)
        assert_close(together.weights[:, :3], alone.weights, f"weights after {num_iters}", scale=scale)


def test_iterating_for_long_forgets_the_query(backend):
    p = problem(2, 0, 4, 5, 8)
    damping = torch.linalg.matrix_norm(p.state.mean, 2).square()
    damping = (damping / (damping + p.ridge)).max().item()
    first, last = run(p, backend).values, run(p, backend, num_iters=200).values
    assert last.norm(dim=-1).max() <= damping**199 * first.norm(dim=-1).max() + 1e-12


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("num_iters", [1, 3])
def test_empty_axes(shape, num_iters, backend, dtype):
    B, _, Q, K, C = shape
    result = run(problem(*shape, dtype), backend, num_iters=num_iters)
    assert result.values.shape == (B, Q, C)
    assert result.weights.shape == (B, Q, K)
    if 0 in (K, C):
        assert oracle.largest(result.values) == 0
        assert oracle.largest(result.weights) == 0


@pytest.mark.parametrize("preset", [(32, 100), (64, 200), (128, 200), (256, 512)], ids=["S", "M", "L", "XL"])
def test_presets_in_float32(preset, backend):
    p = problem(1, 0, 32, *preset, torch.float32)
    exact = oracle.flat(run(oracle.map_tensors(p, torch.Tensor.double), "reference", num_iters=10))
    oracle.judge(lambda p, b: run(p, b, num_iters=10), p, exact, backend)


# ---------------------------------------------------------------------------------------------------- attractor_read


def attract(p, **options):
    options = {"clean": torch.tanh, "num_iters": 5, "backend": "reference", **options}
    return attractor_read(p.state, p.queries, p.noise_var[:, 0].contiguous(), p.ridge, **options)


def attractor_truth(p, **options):
    arguments = (*p.state, p.queries, p.noise_var[:, 0], p.ridge)
    options = {"clean": lambda x: np.tanh(x), "num_iters": 5, **options}
    return batched(oracle.attractor_read, *arguments, **options)


@pytest.mark.parametrize("weight_var", [0.0, 0.3])
@pytest.mark.parametrize("tol", [None, 0.0, 0.02])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attractor_read_equals_one_query_at_a_time(shape, tol, weight_var, backend):
    p = problem(*shape)
    options = {"tol": tol, "weight_var": weight_var}
    assert_result(attract(p, backend=backend, **options), attractor_truth(p, **options))


def test_attractor_read_in_float32(backend):
    p = problem(3, 1, 6, 7, 9, torch.float32)
    assert_result(attract(p, backend=backend, weight_var=0.2), attractor_truth(p, weight_var=0.2, tol=None))


@pytest.mark.parametrize("num_iters", [1, 2, 6])
def test_attractor_with_the_identity_is_read(num_iters, backend):
    p = problem(3, 1, 6, 7, 9)
    result = attract(p, clean=lambda code: code, num_iters=num_iters, backend=backend)
    assert_result(result, oracle.flat(run(p, backend, num_iters=num_iters)))
    assert (result.num_iters == num_iters).all()


def test_queries_stop_one_by_one(backend):
    """A looser tolerance stops earlier; a query that stopped keeps the values and the energy it stopped with."""
    p = problem(2, 1, 40, 6, 8)
    full = [attract(p, num_iters=n, backend=backend) for n in range(1, 31)]
    stopped = attract(p, num_iters=30, tol=0.003, backend=backend)
    assert 1 < stopped.num_iters.min() < stopped.num_iters.max() < 30, "the problem must make queries stop apart"
    for b in range(2):
        for q in range(40):
            n = int(stopped.num_iters[b, q])
            at_stop = full[n - 1]
            assert torch.equal(stopped.values[b, q], at_stop.values[b, q])
            assert torch.equal(stopped.weights[b, q], at_stop.weights[b, q])
            assert_close(stopped.energy[b, q, :n], at_stop.energy[b, q], "energy")
            assert (stopped.energy[b, q, n:] == stopped.energy[b, q, n - 1]).all()
            steps = [(full[i].values - full[i - 1].values)[b, q].square().mean().sqrt() for i in range(1, n)]
            assert steps[-1] <= 0.003
            assert all(step > 0.003 for step in steps[:-1])


@pytest.mark.parametrize("tol", [None, 0.0])
def test_without_tolerance_every_iteration_runs(tol, backend):
    result = attract(problem(2, 1, 5, 6, 8), num_iters=4, tol=tol, backend=backend)
    assert (result.num_iters == 4).all()
    assert result.num_iters.dtype == torch.int64
    assert result.energy.shape == (2, 5, 4)


def test_a_query_at_rest_has_arrived(backend):
    """A codec that always answers the same: the third read-out is the second, and the last with a tolerance of 0."""
    p = problem(2, 1, 3, 4, 5)
    assert (attract(p, clean=torch.ones_like, num_iters=6, tol=0.0, backend=backend).num_iters == 3).all()
    assert (attract(p, clean=torch.ones_like, num_iters=6, backend=backend).num_iters == 6).all()


def test_clean_runs_between_reads_only():
    seen = []

    def clean(code):
        seen.append(code.clone())
        return 0.9 * code

    p = problem(2, 1, 5, 6, 8)
    result = attract(p, clean=clean, num_iters=4)
    assert len(seen) == 3
    for i, code in enumerate(seen):
        assert torch.equal(code, attract(p, clean=lambda x: 0.9 * x, num_iters=i + 1).values)
    assert not torch.equal(result.values, seen[-1])
    attract(p, clean=lambda code: pytest.fail("one read needs no codec"), num_iters=1)


def test_clean_is_not_called_once_all_queries_have_stopped(backend):
    calls, options = [], {"num_iters": 50, "tol": 1e9, "backend": backend}
    result = attract(problem(1, 1, 3, 4, 5), clean=lambda code: calls.append(1) or code, **options)
    assert len(calls) == 1
    assert (result.num_iters == 2).all()


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_settled_queries_are_not_read_again(monkeypatch):
    """Once they are half of a memory's, only the others are, and no query's result depends on that."""
    from fastkm.reading import attractor

    read_again, turn = [], attractor.pattern_energy
    monkeypatch.setattr(attractor, "pattern_energy", lambda *a: read_again.append(a[2].shape[1]) or turn(*a))
    p = problem(2, 1, 40, 6, 8)
    stopped = attract(p, num_iters=30, tol=0.003, backend="native")
    going = [int((stopped.num_iters > n).sum(1).max()) for n in range(stopped.num_iters.max())]
    assert read_again == [n if 2 * n <= 40 else 40 for n in going]
    assert len(set(read_again)) > 2


@pytest.mark.parametrize("tol", [None, 0.003])
def test_gradients_of_an_attractor_read_go_through_every_iteration(tol, backend):
    """Those of the literal loop, by every argument and by a parameter of the codec."""
    p, gain = problem(2, 1, 12, 6, 8), torch.tensor(0.9, dtype=torch.float64)
    inputs = [*p.state, p.queries, p.noise_var[:, 0], p.ridge, gain]

    def gradients(name):
        leaves = [x.clone().requires_grad_() for x in inputs]
        mean, cov, queries, noise, ridge, factor = leaves
        result = attractor_read(
            (mean, cov), queries, noise, ridge, clean=lambda x: torch.tanh(factor * x), num_iters=6, tol=tol,
            weight_var=0.2, backend=name,
        )  # fmt: skip
        loss = sum((x * torch.linspace(1, 2, x.numel()).view(x.shape)).sum() for x in result[:3])
        return torch.autograd.grad(loss, leaves)

    for x, y in zip(gradients(backend), gradients("reference"), strict=True):
        assert_close(x, y)


def test_the_gradient_of_the_last_iteration_alone(backend):
    """As the page says: the others without a gradient, then one read of what they cleaned."""
    p, options = problem(2, 1, 5, 6, 8), {"clean": torch.tanh, "backend": backend}
    mean = p.state.mean.clone().requires_grad_()
    state, noise = p.state._replace(mean=mean), p.noise_var[:, 0]
    with torch.no_grad():
        code = torch.tanh(attractor_read(state, p.queries, noise, p.ridge, num_iters=3, **options).values)
    last = attractor_read(state, code, noise, p.ridge, num_iters=1, **options).values
    whole = attractor_read(state, p.queries, noise, p.ridge, num_iters=4, **options).values
    assert_close(last.detach(), whole.detach())
    expected = torch.autograd.grad(read(mean, code, p.ridge, backend="reference").values.sum(), mean)
    assert_close(torch.autograd.grad(last.sum(), mean)[0], expected[0])


def test_memory_is_factored_once(monkeypatch):
    factorisations = []
    factor = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: factorisations.append(1) or factor(*a, **k))
    attract(problem(2, 1, 5, 6, 8), num_iters=7)
    assert len(factorisations) == 1


@pytest.mark.parametrize(
    ("clean", "got"),
    [
        (lambda code: code[..., :-1], r"\[2, 5, 7\]"),
        (lambda code: code[0], r"\[5, 8\]"),
        (lambda code: code.float(), "float32"),
        (lambda code: code.to("meta"), "meta"),
        (lambda code: code.numpy(), "ndarray"),
        (lambda code: None, "NoneType"),
    ],
    ids=["code size", "rank", "dtype", "device", "array", "nothing"],
)
def test_clean_must_return_codes_like_its_input(clean, got):
    with pytest.raises((TypeError, ValueError), match=rf"clean must return.*got.*{got}"):
        attract(problem(2, 1, 5, 6, 8), clean=clean)


@pytest.mark.parametrize("weight_var", [0.0, 0.3])
def test_energy_is_the_expectation_it_claims_to_be(weight_var):
    """A Monte-Carlo average of −ln p(x | w, M) over q(M) and q(w), within six of its own standard errors."""
    p = problem(1, 1, 1, 4, 5)
    result = attract(p, num_iters=1, weight_var=weight_var)
    samples, noise = 20_000, p.noise_var[0, 0]
    prior_var = noise / p.ridge[0]
    root = torch.linalg.cholesky(p.state.cov[0])
    memories = p.state.mean[0] + root @ torch.randn(samples, 4, 5, dtype=torch.float64)
    means = result.weights[0, 0] + math.sqrt(weight_var) * torch.randn(samples, 1, 4, dtype=torch.float64)
    predicted = (means @ memories).squeeze(1)
    surprise = -torch.distributions.Normal(predicted, noise.sqrt()).log_prob(p.queries[0, 0]).sum(-1)
    if weight_var:
        q, prior = (torch.distributions.Normal(m, v**0.5) for m, v in ((result.weights, weight_var), (0, prior_var)))
        cost = torch.distributions.kl_divergence(q, prior).sum()
    else:
        cost = -torch.distributions.Normal(0, prior_var.sqrt()).log_prob(result.weights).sum()
    gap = (surprise.mean() + cost - result.energy[0, 0, 0]).abs()
    assert gap <= 6 * surprise.std() / math.sqrt(samples)


def test_addressing_minimises_the_energy_of_a_certain_memory():
    """For U = 0 no other weights have a lower energy."""
    from fastkm.reading.attractor import pattern_energy

    p = problem(2, 1, 3, 6, 8)
    noise, none = p.noise_var[:, 0], torch.zeros_like(p.state.cov)
    best = solve_addressing(p.state.mean, p.queries, p.ridge)

    def energy(weights):
        return pattern_energy(p.state.mean, none, p.queries, weights, weights @ p.state.mean, noise, p.ridge, None)

    for scale in (1e-3, 1e-1, 10.0):
        other = best + scale * torch.randn_like(best)
        assert (energy(other) > energy(best)).all()


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_attractor_empty_axes(shape):
    B, _, Q, K, C = shape
    p = problem(*shape)
    clean = {"clean": torch.tanh, "num_iters": 3, "backend": "reference"}
    result = attractor_read(p.state, p.queries, 1.0, p.ridge, **clean)
    assert (result.values.shape, result.weights.shape) == ((B, Q, C), (B, Q, K))
    assert (result.energy.shape, result.num_iters.shape) == ((B, Q, 3), (B, Q))


def test_a_query_that_is_not_a_number_never_settles(backend):
    """It takes every iteration, and the others stop where they would without it."""
    p = problem(2, 1, 4, 5, 6)
    alone = attract(p, tol=0.003, num_iters=30, backend=backend)
    queries = p.queries.clone()
    queries[0, 2, 1] = torch.nan
    beside = attract(p._replace(queries=queries), tol=0.003, num_iters=30, backend=backend)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[0, 2] = False
    assert beside.num_iters[0, 2] == 30
    assert beside.energy[0, 2].isnan().all()
    assert torch.equal(beside.num_iters[others], alone.num_iters[others])
    assert (alone.num_iters < 30).any()
