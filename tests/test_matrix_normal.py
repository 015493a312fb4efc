"""The matrix normal distribution, its Kronecker covariance, and the divergences, against dense Gaussians.

The one bound used throughout: the Cholesky factor of an n × n matrix A of condition number κ is the exact factor of a
matrix within ``n (n + 1) eps κ`` of A relative to A itself (Higham, Accuracy and Stability of Numerical Algorithms,
theorem 10.3), so a log-determinant moves by at most n times that, a trace or quadratic form by that times its size.
"""

import math
import re
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from fastkm import KroneckerCovariance, MatrixNormal, MemoryState, kl_memory, kl_weights
from fastkm._linalg.reference import variance_divergence
from fastkm.matrix_normal import logdet

CONDITION = 30.0  # of every covariance below
LinAlgError = torch.linalg.LinAlgError


def spd(*shape, dtype=torch.float64, scale=1.0):
    """A covariance [..., n, n] with eigenvalues from ``scale / CONDITION`` to ``scale``."""
    n = shape[-1]
    basis = torch.linalg.qr(torch.randn(*shape, n, dtype=torch.float64)).Q
    values = scale * torch.logspace(-math.log10(CONDITION), 0, n, dtype=torch.float64)
    cov = (basis * values) @ basis.mT
    return (0.5 * (cov + cov.mT)).to(dtype)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def law(batch, rows, columns, with_columns=True, dtype=torch.float64):
    col_cov = spd(*batch, columns, dtype=dtype, scale=2.0) if with_columns else None
    return MatrixNormal(randn(*batch, rows, columns, dtype=dtype), spd(*batch, rows, dtype=dtype), col_cov)


def kron(a, b):
    """The Kronecker product of the last two axes."""
    product = a.unsqueeze(-1).unsqueeze(-3) * b.unsqueeze(-2).unsqueeze(-4)
    return product.reshape(*product.shape[:-4], a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1])


def dense(p):
    """The same law over the row-major ``.flatten()``."""
    columns = p.event_shape[1]
    col_cov = torch.eye(columns, dtype=p.loc.dtype) if p.col_cov is None else p.col_cov
    return MultivariateNormal(p.loc.flatten(-2), kron(p.row_cov, col_cov))


def close(actual, truth, size, terms, dtype=torch.float64, condition=CONDITION**2):
    """Hold ``actual`` to the bound above; ``terms`` are the size of the traces and quadratic forms."""
    assert actual.shape == truth.shape
    bound = 2 * size * (size + 1) * torch.finfo(dtype).eps * condition * (size + torch.as_tensor(terms))
    error = (actual.double() - truth.double()).abs()
    assert (error <= bound).all(), f"error {error.max()} above {bound}"


SHAPES = [((), 1, 1), ((), 3, 4), ((2,), 4, 3), ((2, 3), 2, 5), ((2,), 1, 4), ((2,), 4, 1)]
both = pytest.mark.parametrize("with_columns", [False, True], ids=["identity columns", "general columns"])
shapes = pytest.mark.parametrize(("batch", "rows", "columns"), SHAPES)


# Kronecker = dense


@both
@shapes
def test_log_prob_is_that_of_the_dense_gaussian(batch, rows, columns, with_columns):
    p = law(batch, rows, columns, with_columns)
    value = p.loc + randn(7, *batch, rows, columns)
    truth = dense(p).log_prob(value.flatten(-2))
    close(p.log_prob(value), truth, rows * columns, truth.abs().max())


@both
@shapes
def test_entropy_is_that_of_the_dense_gaussian(batch, rows, columns, with_columns):
    p = law(batch, rows, columns, with_columns)
    close(p.entropy(), dense(p).entropy(), rows * columns, 0.0)


@pytest.mark.parametrize("prior_columns", [False, True], ids=["prior I", "prior V"])
@both
@shapes
def test_kl_is_that_of_the_dense_gaussians(batch, rows, columns, with_columns, prior_columns):
    p, q = law(batch, rows, columns, with_columns), law(batch, rows, columns, prior_columns)
    truth = kl_divergence(dense(p), dense(q))
    close(kl_divergence(p, q), truth, rows * columns, rows * columns + truth.abs().max())


@both
@shapes
def test_kl_to_itself_is_zero(batch, rows, columns, with_columns):
    p = law(batch, rows, columns, with_columns)
    close(kl_divergence(p, p), torch.zeros(batch, dtype=torch.float64), rows * columns, 0.0)


@both
@shapes
def test_mean_mode_and_variance(batch, rows, columns, with_columns):
    p = law(batch, rows, columns, with_columns)
    assert torch.equal(p.mean, p.loc)
    assert torch.equal(p.mode, p.loc)
    torch.testing.assert_close(p.variance, dense(p).variance.reshape(p.loc.shape), rtol=1e-14, atol=0)
    assert p.batch_shape == batch
    assert p.event_shape == (rows, columns)


def test_columns_of_a_memory_are_independent_gaussians():
    p = law((2,), 4, 3, with_columns=False)
    value = randn(2, 4, 3)
    truth = MultivariateNormal(p.loc.mT, p.row_cov.unsqueeze(1)).log_prob(value.mT).sum(-1)
    close(p.log_prob(value), truth, 12, truth.abs().max(), condition=CONDITION)


# Sampling


@both
def test_sample_moments(with_columns):
    """Every mean and second moment within six standard errors of the law's: a chance of under 1e-7 to fail if right."""
    p, n = law((), 2, 3, with_columns), 40_000
    deviation = (p.rsample((n,)) - p.loc).flatten(-2)  # [n, KC]
    cov = dense(p).covariance_matrix
    variance = cov.diagonal()
    assert (deviation.mean(0).abs() <= 6 * (variance / n).sqrt()).all()
    error = (deviation.mT @ deviation / n - cov).abs()
    assert (error <= 6 * ((torch.outer(variance, variance) + cov.square()) / n).sqrt()).all()


@both
def test_samples_are_reparametrised(with_columns):
    """``R + chol(U) E chol(V)ᵀ`` of the same standard normal E, so the gradient for R is that of the identity."""
    p = law((2,), 3, 4, with_columns)
    p.loc.requires_grad_()
    p.covariance.row_factor.requires_grad_()
    torch.manual_seed(7)
    sample = p.rsample((5,))
    torch.manual_seed(7)
    noise = randn(5, 2, 3, 4)
    col_factor = torch.eye(4, dtype=torch.float64) if p.col_cov is None else torch.linalg.cholesky(p.col_cov)
    truth = p.loc + torch.linalg.cholesky(p.row_cov) @ noise @ col_factor.mT
    torch.testing.assert_close(sample, truth, rtol=0, atol=1e-14 * truth.abs().max().item())
    sample.sum().backward()
    torch.testing.assert_close(p.loc.grad, torch.full_like(p.loc, 5.0), rtol=0, atol=0)
    assert p.covariance.row_factor.grad.abs().min() > 0
    assert not p.sample().requires_grad


def test_whitened_samples_are_standard_normal():
    p = law((), 3, 2)
    torch.manual_seed(3)
    white = p.covariance.whiten(p.sample((4,)) - p.loc)
    torch.manual_seed(3)
    torch.testing.assert_close(white, randn(4, 3, 2), rtol=0, atol=6 * 7 * CONDITION * 2.3e-16 * 10)


# Gradients


def _from_roots(loc, root, col_root):
    """Covariances A Aᵀ + I of free matrices A: what moves one entry of U alone is no covariance."""
    cov, col_cov = (a @ a.mT + torch.eye(a.shape[-1], dtype=a.dtype) for a in (root, col_root))
    return loc, cov, col_cov


@both
@pytest.mark.parametrize("quantity", ["log_prob", "rsample", "entropy", "kl from", "kl to", "solve", "matvec"])
def test_gradients(quantity, with_columns):
    value, other = randn(2, 3, 2), law((2,), 3, 2)

    def compute(loc, root, col_root):
        loc, cov, col_cov = _from_roots(loc, root, col_root)
        p = MatrixNormal(loc, cov, col_cov if with_columns else None)
        torch.manual_seed(5)
        return {
            "log_prob": lambda: p.log_prob(value),
            "rsample": lambda: p.rsample((2,)),
            "entropy": p.entropy,
            "kl from": lambda: kl_divergence(p, other),
            "kl to": lambda: kl_divergence(other, p),
            "solve": lambda: p.covariance.solve(loc),
            "matvec": lambda: p.covariance.matvec(loc),
        }[quantity]()

    inputs = randn(2, 3, 2), randn(2, 3, 3), randn(2, 2, 2)
    assert torch.autograd.gradcheck(compute, [x.requires_grad_() for x in inputs])


def test_log_prob_is_differentiable_in_the_value():
    p = law((2,), 3, 2)
    assert torch.autograd.gradcheck(p.log_prob, [randn(2, 3, 2).requires_grad_()])


# The Kronecker covariance


@both
@shapes
def test_operators_are_those_of_the_dense_matrix(batch, rows, columns, with_columns):
    p = law(batch, rows, columns, with_columns)
    covariance, matrix, x = p.covariance, dense(p).covariance_matrix, randn(*batch, rows, columns)
    flat, size = x.flatten(-2).unsqueeze(-1), rows * columns
    close(covariance.matvec(x), (matrix @ flat).reshape(x.shape), size, x.abs().max(), condition=1)
    inverse = torch.cholesky_solve(flat, torch.linalg.cholesky(matrix)).reshape(x.shape)
    close(covariance.solve(x), inverse, size, inverse.abs().max())
    truth = (flat.flatten(-2) * inverse.flatten(-2)).sum(-1)
    close(covariance.quadratic_form(x), truth, size, truth.abs().max())
    close(covariance.logdet(columns), torch.linalg.slogdet(matrix).logabsdet, size, 0.0)


@both
@shapes
def test_solve_undoes_matvec_and_whiten_undoes_color(batch, rows, columns, with_columns):
    covariance, x = law(batch, rows, columns, with_columns).covariance, randn(*batch, rows, columns)
    size, largest = rows * columns, x.abs().max()
    close(covariance.solve(covariance.matvec(x)), x, size, largest)
    close(covariance.matvec(covariance.solve(x)), x, size, largest)
    close(covariance.whiten(covariance.color(x)), x, size, largest)


def test_matvec_is_color_twice():
    """L Lᵀ = V ⊗ U: colouring with the factors and with their transposes is the covariance."""
    covariance, x = law((2,), 3, 4).covariance, randn(2, 3, 4)
    transposed = covariance.row_factor.mT @ x @ covariance.col_factor
    close(covariance.color(transposed), covariance.matvec(x), 12, x.abs().max(), condition=1)


def test_identity_columns_build_no_matrix_over_columns():
    """C = 2²⁰: a C × C matrix would be 8 TB."""
    columns = 2**20
    p = MatrixNormal(torch.zeros(2, columns), spd(2, dtype=torch.float32))
    value = p.rsample()
    for result in (p.log_prob(value), p.entropy(), kl_divergence(p, p), p.variance, p.covariance.solve(value)):
        assert result.isfinite().all()
    assert p.col_cov is None


def test_logdet_of_identity_columns_needs_their_number():
    covariance = KroneckerCovariance(spd(3))
    with pytest.raises(ValueError, match="num_columns must be given when col_cov is None"):
        covariance.logdet()
    assert KroneckerCovariance(spd(3), spd(2)).logdet().shape == ()
    with pytest.raises(ValueError, match="num_columns must be 2 like col_cov, got 5"):
        KroneckerCovariance(spd(3), spd(2)).logdet(5)


# Batches


def test_batch_shapes_broadcast():
    loc, row_cov, col_cov = randn(5, 1, 3, 2), spd(4, 3), spd(2)
    p = MatrixNormal(loc, row_cov, col_cov)
    whole = MatrixNormal(loc.expand(5, 4, 3, 2), row_cov.expand(5, 4, 3, 3), col_cov.expand(5, 4, 2, 2))
    assert p.batch_shape == (5, 4)
    assert p.loc.shape == p.variance.shape == p.sample().shape == (5, 4, 3, 2)
    assert p.row_cov.shape == (5, 4, 3, 3)
    assert p.col_cov.shape == (5, 4, 2, 2)
    value = randn(6, 5, 4, 3, 2)
    for actual, truth in [
        (p.log_prob(value), whole.log_prob(value)),
        (p.log_prob(value[0, 0, 0]), whole.log_prob(value[0, 0, 0])),
        (p.entropy(), whole.entropy()),
        (kl_divergence(p, MatrixNormal(loc[0], row_cov[0])), kl_divergence(whole, MatrixNormal(loc[0], row_cov[0]))),
    ]:
        close(actual, truth, 6, truth.abs().max())


@both
def test_every_entry_alone_is_as_in_the_batch(with_columns):
    p, q, value = law((3,), 4, 3, with_columns), law((3,), 4, 3), randn(3, 4, 3)
    for b in range(3):
        col_cov = None if p.col_cov is None else p.col_cov[b]
        alone, prior = MatrixNormal(p.loc[b], p.row_cov[b], col_cov), MatrixNormal(q.loc[b], q.row_cov[b], q.col_cov[b])
        for actual, truth in [
            (p.log_prob(value)[b], alone.log_prob(value[b])),
            (p.entropy()[b], alone.entropy()),
            (kl_divergence(p, q)[b], kl_divergence(alone, prior)),
        ]:
            close(actual, truth, 12, truth.abs())


@both
def test_expand(with_columns):
    p = law((3,), 4, 2, with_columns)
    wide = p.expand((5, 3))
    value = randn(5, 3, 4, 2)
    assert wide.batch_shape == (5, 3)
    assert wide.event_shape == p.event_shape
    assert wide.row_cov.shape == (5, 3, 4, 4)
    assert wide.covariance is p.covariance  # nothing is factored again
    assert torch.equal(wide.log_prob(value), p.log_prob(value))
    assert torch.equal(wide.entropy(), p.entropy().expand(5, 3))
    assert torch.equal(kl_divergence(wide, p), kl_divergence(p, p).expand(5, 3))
    assert wide.rsample((2,)).shape == (2, 5, 3, 4, 2)
    lenient = MatrixNormal(p.loc, p.row_cov, validate_args=False).expand((5, 3))
    nan = torch.full((4, 2), torch.nan, dtype=torch.float64)
    assert lenient.log_prob(nan).isnan().all()
    with pytest.raises(ValueError, match="within the support"):
        wide.log_prob(nan)


def test_works_inside_independent():
    p, value = law((3,), 4, 2), randn(3, 4, 2)
    assert torch.equal(torch.distributions.Independent(p, 1).log_prob(value), p.log_prob(value).sum(-1))


@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    rows=st.integers(0, 6),
    columns=st.integers(0, 6),
    with_columns=st.booleans(),
    samples=st.lists(st.integers(0, 2), max_size=1),
)
def test_shapes(batch, rows, columns, with_columns, samples):
    """Every size from 0: shapes as declared, values those of the dense law."""
    p = law(batch, rows, columns, with_columns)
    value = p.rsample(samples)
    assert value.shape == (*samples, *batch, rows, columns)
    assert p.entropy().shape == kl_divergence(p, p).shape == tuple(batch)
    log_prob = p.log_prob(value)
    assert log_prob.shape == (*samples, *batch)
    if log_prob.numel() and rows * columns:
        truth = dense(p).log_prob(value.flatten(-2))
        close(log_prob, truth, rows * columns, truth.abs().max())
    else:
        assert (log_prob == 0).all()  # the density of an empty matrix is 1


@both
def test_non_contiguous_arguments(with_columns):
    p, value = law((2,), 4, 3, with_columns), randn(2, 4, 3)
    loc, row_cov = (x.mT.contiguous().mT for x in (p.loc, p.row_cov))
    other = MatrixNormal(loc, row_cov, None if p.col_cov is None else p.col_cov.mT)
    for actual, truth in [
        (other.log_prob(value.mT.contiguous().mT), p.log_prob(value)),
        (kl_divergence(other, p), torch.zeros(2, dtype=torch.float64)),
        (logdet(row_cov, backend="reference"), logdet(p.row_cov, backend="reference")),
    ]:
        close(actual, truth, 12, truth.abs())


@both
def test_float32_is_float64_within_its_rounding(with_columns):
    p, q = law((2,), 5, 4, with_columns, torch.float32), law((2,), 5, 4, with_columns, torch.float32)
    value = randn(2, 5, 4, dtype=torch.float32)
    exact_p, exact_q = (
        MatrixNormal(x.loc.double(), x.row_cov.double(), None if x.col_cov is None else x.col_cov.double())
        for x in (p, q)
    )
    # The triangular factors are of size 5 and 4, so their bounds add: size 9 and the larger condition, not the product.
    for actual, truth in [
        (p.log_prob(value), exact_p.log_prob(value.double())),
        (p.entropy(), exact_p.entropy()),
        (kl_divergence(p, q), kl_divergence(exact_p, exact_q)),
    ]:
        assert actual.dtype == torch.float32
        close(actual, truth, 9, 20 + truth.abs().max(), torch.float32, condition=CONDITION)


# Divergences of a memory


def test_kl_weights_is_that_of_independent_normals():
    weights = randn(2, 3, 5)
    weight_var, prior_var = torch.rand(2, 3, dtype=torch.float64) + 0.1, torch.rand(2, 1, dtype=torch.float64) + 0.5
    posterior = Normal(weights, weight_var.sqrt().unsqueeze(-1))
    truth = kl_divergence(posterior, Normal(torch.zeros_like(weights), prior_var.sqrt().unsqueeze(-1))).sum(-1)
    eps = torch.finfo(torch.float64).eps
    torch.testing.assert_close(kl_weights(weights, weight_var, prior_var), truth, rtol=20 * eps, atol=40 * eps)
    truth = kl_divergence(Normal(weights, 0.3), Normal(torch.zeros_like(weights), 2.0)).sum(-1)
    torch.testing.assert_close(kl_weights(weights, 0.09, 4.0), truth, rtol=20 * eps, atol=40 * eps)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_kl_weights_takes_variances_that_spread_over_the_vectors(shape, which):
    weights, variances = randn(2, 3, 4), [torch.tensor(0.3).double(), torch.tensor(1.2).double()]
    variances[which] = randn(*shape, 1)[..., 0].exp()
    truth = kl_weights(weights, *(x.expand(2, 3).clone() for x in variances))
    torch.testing.assert_close(kl_weights(weights, *variances), truth)


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 4), (4,), (3, 2), (1, 1, 1), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("name", ["weight_var", "prior_var"])
def test_kl_weights_refuses_variances_of_another_shape(shape, name):
    """Broadcasting would make more of the answer, or take another axis for [...]."""
    variances = {"weight_var": 1.0, "prior_var": 1.0, name: torch.ones(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=re.escape(f"{name} must be a float or broadcast to [...] = [2, 3], got ")):
        kl_weights(randn(2, 3, 4), **variances)


@pytest.mark.parametrize("weights", [torch.ones(2, 3, dtype=torch.int64), torch.tensor(1.0), [1.0]], ids=str)
def test_kl_weights_refuses_weights_that_are_no_vectors(weights):
    with pytest.raises(TypeError, match="weights must be a floating-point tensor"):
        kl_weights(weights, 1.0, 1.0)


@pytest.mark.parametrize(("bad", "name"), [((0.0, 1.0), "weight_var"), ((1.0, -1.0), "prior_var")])
def test_kl_weights_needs_positive_variances(bad, name):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        kl_weights(randn(2, 3), *bad)


def memory(batch, rows, columns, dtype=torch.float64):
    return MemoryState(randn(batch, rows, columns, dtype=dtype), spd(batch, rows, dtype=dtype))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 4), (5, 2), (1, 3), (4, 1)])
def test_kl_memory_is_that_of_matrix_normals_and_of_dense_gaussians(rows, columns, backend):
    state, prior = memory(3, rows, columns), memory(3, rows, columns)
    kl = kl_memory(state, prior, backend=backend)
    p, q = MatrixNormal(*state), MatrixNormal(*prior)
    for truth in (kl_divergence(p, q), kl_divergence(dense(p), dense(q))):
        close(kl, truth, rows * columns, rows * columns + truth.abs().max())
    assert (kl_memory(state, state, backend=backend).abs() <= 1e-12).all()


@pytest.mark.parametrize(("batch", "rows", "columns"), [(0, 3, 2), (2, 0, 3), (2, 3, 0)])
def test_kl_memory_of_nothing_is_nothing(batch, rows, columns, backend):
    state, prior = memory(batch, rows, columns), memory(batch, rows, columns)
    kl = kl_memory(state, prior, backend=backend)
    assert kl.shape == (batch,)
    assert (kl.abs() <= 0).all()


def test_kl_memory_is_differentiable():
    def compute(mean, root, prior_mean, prior_root):
        cov, prior_cov = (a @ a.mT + torch.eye(3, dtype=a.dtype) for a in (root, prior_root))
        return kl_memory(MemoryState(mean, cov), MemoryState(prior_mean, prior_cov), backend="reference")

    inputs = randn(2, 3, 2), randn(2, 3, 3), randn(2, 3, 2), randn(2, 3, 3)
    assert torch.autograd.gradcheck(compute, [x.requires_grad_() for x in inputs])


# ---- laws that are close to each other: a divergence is far below the terms that its formula subtracts --------------


def exact_divergence(gap: float) -> float:
    """r − 1 − ln r for r = 1 + gap, to a hundred digits."""
    with localcontext() as context:
        context.prec = 100
        return float(Decimal(gap) - (1 + Decimal(gap)).ln())


def gaps(dtype):
    """What a variance may exceed 1 by, of either sign and of every size."""
    sizes = 10 ** torch.arange(-18, 0.05, 0.1, dtype=torch.float64)
    return torch.cat([sizes, 10**3 * sizes, -sizes[:-1], sizes[-60:-1] - 1]).to(dtype)


def test_variance_divergence_keeps_its_digits(dtype):
    """u has three roundings, which u² doubles; the sum and its product have five more."""
    excess = gaps(dtype)
    got = variance_divergence(1 + excess, excess)
    # Outside the series the ratio itself is rounded, which is all of ln r near r = 0.
    exact = torch.tensor([exact_divergence(x) for x in excess.tolist()], dtype=torch.float64)
    rounded = torch.where(excess < -0.5, torch.finfo(dtype).eps / (1 + excess.double()), 0)
    assert ((got.double() - exact).abs() <= 12 * torch.finfo(dtype).eps * exact + rounded).all()
    assert (got >= 0).all()


def test_gradient_of_variance_divergence_keeps_its_digits(dtype):
    """1 − 1/r = (r − 1)/r."""
    excess = gaps(dtype)
    excess = excess[(excess.abs() > 1e-12) & (excess > -0.999)].requires_grad_()
    (got,) = torch.autograd.grad(variance_divergence(1 + excess, excess).sum(), excess)
    exact = excess.detach().double() / (1 + excess.detach().double())
    rounding = torch.finfo(dtype).eps / (1 + excess.detach().double()).clamp_max(1) ** 2
    assert ((got.double() - exact).abs() <= 16 * rounding * exact.abs()).all()


def test_kl_weights_of_nearly_equal_variances(dtype):
    weights = torch.zeros(3, 7, dtype=dtype)
    for gap in (0, 1e-6, -1e-4, 0.03):
        prior_var = torch.tensor(0.7, dtype=dtype)
        weight_var = (1 + gap) * prior_var
        exact = 3.5 * exact_divergence(weight_var.item() / prior_var.item() - 1)
        got = kl_weights(weights, weight_var, prior_var)
        # float64 holds r − 1 to eps, which its square doubles.
        bound = 12 * torch.finfo(dtype).eps * exact + 8 * torch.finfo(torch.float64).eps * abs(gap)
        assert ((got.double() - exact).abs() <= bound).all()
        assert (got >= 0).all()


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 1e-3, 0.1])
@pytest.mark.parametrize("rows", [1, 6, 33])
def test_kl_memory_of_nearly_equal_memories(rows, size, backend):
    """With M = L0⁻¹L the KL is about C/2 ‖M − I‖²: its root moves as M does, by the bound above."""
    torch.manual_seed(rows)
    columns, batch = 5, 4
    prior = MemoryState(randn(batch, rows, columns).float(), spd(batch, rows).float())
    change = size * randn(batch, rows, rows)
    factor = torch.linalg.cholesky(prior.cov.double()) @ (torch.eye(rows, dtype=torch.float64) + change)
    state = MemoryState(prior.mean, (factor @ factor.mT).float() if size else prior.cov)
    got = kl_memory(state, prior, backend=backend)
    exact = kl_memory(*(MemoryState(*(x.double() for x in law)) for law in (state, prior)), backend="reference")
    if not size:
        assert torch.equal(got, torch.zeros(batch))
    assert (got >= 0).all()
    bound = 2 * math.sqrt(columns) * rows * (rows + 1) * torch.finfo(torch.float32).eps * CONDITION
    assert ((got.double().sqrt() - exact.sqrt()).abs() <= bound).all()


@pytest.mark.parametrize("with_columns", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-3])
def test_kl_of_nearly_equal_laws(size, with_columns, dtype):
    p = law((3,), 4, 3, with_columns, dtype)
    row_cov = p.row_cov * (1 + size)
    col_cov = p.col_cov / (1 + size) if with_columns else None
    q = MatrixNormal(p.loc, row_cov, col_cov)
    got = kl_divergence(p, q)
    if not size:
        assert torch.equal(got, torch.zeros(3, dtype=dtype))
    assert (got >= 0).all()
    # Rows and columns compensate each other exactly but for rounding; alone, each entry has r = 1/(1 + size).
    exact = 0.0 if with_columns else 6 * exact_divergence(1 / (1 + size) - 1)
    bound = 2 * math.sqrt(12) * 4 * 5 * torch.finfo(dtype).eps * CONDITION
    assert ((got.double().sqrt() - math.sqrt(exact)).abs() <= bound).all()


def test_kl_memory_deepmind_is_the_released_formula():
    """google-deepmind/dynamic-kanerva-machines, memory.py, ``get_dkl_total``, term by term."""
    batch, rows, columns = 2, 4, 3
    state, prior = memory(batch, rows, columns), memory(batch, rows, columns)
    for b, kl in enumerate(kl_memory(state, prior, method="deepmind")):
        q_diag, p_diag = state.cov[b].diag(), prior.cov[b].diag()
        t1 = columns * sum(q_diag[k] / p_diag[k] for k in range(rows))
        t2 = sum(
            (state.mean[b, k, c] - prior.mean[b, k, c]) ** 2 / p_diag[k] for k in range(rows) for c in range(columns)
        )
        t3 = -columns * rows
        t4 = columns * sum(math.log(p_diag[k]) - math.log(q_diag[k]) for k in range(rows))
        torch.testing.assert_close(kl, t1 + t2 + t3 + t4, rtol=1e-13, atol=1e-13)


def test_kl_memory_deepmind_is_twice_the_exact_one_when_covariances_are_diagonal():
    state, prior = (
        MemoryState(randn(2, 4, 3), torch.diag_embed(torch.rand(2, 4, dtype=torch.float64) + 0.5)) for _ in range(2)
    )
    parity = kl_memory(state, prior, method="deepmind")
    torch.testing.assert_close(parity, 2 * kl_memory(state, prior), rtol=1e-13, atol=1e-13)


# The log-determinant


@pytest.mark.parametrize("size", [0, 1, 2, 5, 17, 33])
def test_logdet(size, dtype, backend):
    cov = spd(3, size, dtype=dtype) if size else torch.zeros(3, 0, 0, dtype=dtype)
    truth = torch.linalg.slogdet(cov.double()).logabsdet
    actual = logdet(cov, backend=backend)
    assert actual.dtype == dtype
    close(actual, truth, size, 0.0, dtype, condition=CONDITION)
    assert logdet(cov[:0], backend=backend).shape == (0,)


def test_logdet_does_not_overflow(backend):
    """The determinant, 10⁶⁰⁰, is no float64."""
    cov = 1e10 * torch.eye(60, dtype=torch.float64).unsqueeze(0)
    torch.testing.assert_close(
        logdet(cov, backend=backend), torch.tensor([600 * math.log(10)], dtype=torch.float64), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("poison", ["nan", "asymmetric", "indefinite"])
def test_logdet_and_kl_memory_name_the_memories_that_fail(poison, backend):
    state, prior = memory(4, 3, 2), memory(4, 3, 2)
    cov, message = _poisoned(state.cov, poison, 2)
    message = "not finite" if poison == "nan" else message
    with pytest.raises(LinAlgError, match=f"cov is {message} in memory .2."):
        logdet(cov, backend=backend)
    for name, pair in (("state", (state._replace(cov=cov), prior)), ("prior", (prior, state._replace(cov=cov)))):
        with pytest.raises(LinAlgError, match=rf"^{name}\.cov is {message} in memory \[2\]$"):
            kl_memory(*pair, backend=backend)


@pytest.mark.parametrize("variance", [-1.0, 0.0])
@pytest.mark.parametrize("row", [0, 17, 39])
def test_a_direction_without_a_variance_is_found_in_every_block(row, variance, dtype, backend):
    """A factor is made block by block; each of them can fail."""
    cov = torch.eye(40, dtype=dtype).repeat(2, 1, 1)
    mean = torch.zeros(2, 40, 3, dtype=dtype)
    good = MemoryState(mean, cov.clone())
    cov[1, row, row] = variance
    with pytest.raises(LinAlgError, match=r"cov is not positive definite in memory \[1\]"):
        logdet(cov, backend=backend)
    for pair in ((MemoryState(mean, cov), good), (good, MemoryState(mean, cov))):
        with pytest.raises(LinAlgError, match=r"cov is not positive definite in memory \[1\]"):
            kl_memory(*pair, backend=backend)


def _poisoned(cov, poison, entry):
    cov = cov.clone()
    bad = cov[entry]
    if poison == "nan":
        bad[1, 1] = torch.nan
    elif poison == "asymmetric":
        bad[0, 1] += 0.01
    else:
        bad -= 2 * torch.eye(bad.shape[-1], dtype=bad.dtype)
    return cov, "not symmetric" if poison == "asymmetric" else "not positive definite"


@pytest.mark.parametrize(
    ("cov", "error", "message"),
    [
        ([[1.0]], TypeError, r"cov must be a tensor of shape \[B, K, K\], got list"),
        (torch.eye(3).half().expand(2, 3, 3), TypeError, "cov must be float32 or float64, got float16"),
        (torch.eye(3), ValueError, r"cov must have shape \[B, K, K\].*got \[3, 3\]"),
        (torch.zeros(2, 3, 4), ValueError, r"cov must have shape \[B, K, K\].*got \[2, 3, 4\]"),
    ],
)
def test_logdet_refuses(cov, error, message, backend):
    with pytest.raises(error, match=message):
        logdet(cov, backend=backend)


# Refusals of the distribution


@pytest.mark.parametrize("validate_args", [False, True])
@pytest.mark.parametrize("poison", ["nan", "asymmetric", "indefinite"])
@pytest.mark.parametrize("name", ["row_cov", "col_cov"])
def test_a_covariance_that_is_none_is_refused_by_name_and_entry(name, poison, validate_args):
    arguments = {"loc": randn(4, 3, 3), "row_cov": spd(4, 3), "col_cov": spd(4, 3)}
    arguments[name], message = _poisoned(arguments[name], poison, 2)
    with pytest.raises(LinAlgError, match=rf"{name} is {message} in batch entries \[2\]"):
        MatrixNormal(**arguments, validate_args=validate_args)
    alone = {argument: value[2] for argument, value in arguments.items()}
    with pytest.raises(LinAlgError, match=rf"{name} is {message}$"):
        MatrixNormal(**alone, validate_args=validate_args)
    pairs = {argument: value.reshape(2, 2, 3, 3) for argument, value in arguments.items()}
    with pytest.raises(LinAlgError, match=rf"{name} is {message} in batch entries \[\[1, 0\]\]"):
        MatrixNormal(**pairs, validate_args=validate_args)


@pytest.mark.parametrize("triangle", [(0, 1), (1, 0)])
def test_nan_in_either_triangle_is_refused(triangle):
    cov = torch.eye(3)
    cov[triangle] = torch.nan
    with pytest.raises(LinAlgError, match="row_cov is not positive definite"):
        KroneckerCovariance(cov)


def test_nan_is_refused_where_arguments_are_validated():
    loc, cov = torch.zeros(3, 2), torch.eye(3)
    poisoned = loc.clone()
    poisoned[1, 1] = torch.nan
    with pytest.raises(ValueError, match="loc"):
        MatrixNormal(poisoned, cov, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        MatrixNormal(loc, cov, validate_args=True).log_prob(poisoned)
    assert MatrixNormal(poisoned, cov, validate_args=False).log_prob(loc).isnan()
    assert MatrixNormal(loc, cov, validate_args=False).log_prob(poisoned).isnan()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.0]], torch.eye(1)), TypeError, r"loc must be a tensor of shape \[..., K, C\], got list"),
        ((torch.zeros(3), torch.eye(3)), ValueError, r"loc must have shape \[..., K, C\], got \[3\]"),
        ((torch.zeros(3, 2).half(), torch.eye(3).half()), TypeError, "loc must be float32 or float64, got float16"),
        ((torch.zeros(3, 2), torch.eye(2)), ValueError, r"row_cov must have shape .* with K = 3, got \[2, 2\]"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), ValueError, r"row_cov must have shape .* with K = 3, got \[3, 2\]"),
        ((torch.zeros(3, 2), torch.eye(3).double()), TypeError, "row_cov must be float32 like loc, got float64"),
        (
            (torch.zeros(3, 2), torch.eye(3), torch.eye(3)),
            ValueError,
            r"col_cov must have shape .* C = 2, got \[3, 3\]",
        ),
        ((torch.zeros(2, 3, 2), torch.eye(3).expand(5, 3, 3)), ValueError, r"\[2\] of loc and \[5\] of row_cov"),
        ((torch.zeros(3, 2), torch.eye(3, device="meta")), ValueError, "row_cov must be on cpu like loc, got meta"),
    ],
)
def test_malformed_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        MatrixNormal(*arguments)


@pytest.mark.parametrize("method", ["matvec", "solve", "color", "whiten", "quadratic_form"])
def test_operators_refuse_a_matrix_of_another_shape_or_dtype(method):
    operator = getattr(KroneckerCovariance(spd(3), spd(2)), method)
    with pytest.raises(ValueError, match=r"x must have shape .* with K = 3, C = 2, got \[2, 3\]"):
        operator(randn(2, 3))
    with pytest.raises(TypeError, match="x must be float64 like row_cov, got float32"):
        operator(torch.zeros(3, 2))


def test_a_value_or_a_prior_of_another_shape_is_refused():
    p = law((), 3, 2)
    with pytest.raises(ValueError, match=r"value must have shape .* with K = 3, C = 2, got \[3, 1\]"):
        p.log_prob(randn(3, 1))
    with pytest.raises(ValueError, match=r"q must have event shape \[3, 2\] like p, got \[2, 3\]"):
        kl_divergence(p, law((), 2, 3))


def test_constraints_map_to_free_parameters():
    """As optimisers and samplers over unconstrained numbers ask of a distribution."""
    p, free = law((2,), 3, 2), randn(2, 3, 2)
    assert torch.equal(torch.distributions.biject_to(p.support)(free), free)
    cov = torch.distributions.transform_to(MatrixNormal.arg_constraints["row_cov"])(randn(2, 3, 3))
    assert MatrixNormal(free, cov).log_prob(free).isfinite().all()


def test_repr_names_the_shapes():
    p = law((2,), 3, 4, with_columns=False)
    assert p.col_cov is None
    assert repr(p) == "MatrixNormal(batch_shape: [2], event_shape: [3, 4])"
    assert repr(p.covariance) == "KroneckerCovariance(row_cov: [2, 3, 3], col_cov: None)"
