"""The matrix normal distribution: a Gaussian over matrices whose covariance is a Kronecker product."""

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints, register_kl, transform_to, transforms
from torch.distributions.utils import lazy_property

from fastkm._linalg.reference import variance_divergence
from fastkm._runtime.deferred import is_value_unknown
from fastkm._runtime.torch_private import is_transformed
from fastkm.matrix_normal.kronecker import KroneckerCovariance, broadcast_batch, check_matrix
from fastkm.matrix_normal.reference import relative_factor


class _RealMatrix(constraints.Constraint):
    """No NaN in a matrix. ``independent(real, 2)`` of torch means the same and fails on an empty batch."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        return ~value.isnan().flatten(-2).any(-1)


@biject_to.register(_RealMatrix)
@transform_to.register(_RealMatrix)
def _unconstrained(constraint: _RealMatrix) -> transforms.Transform:
    return transforms.IndependentTransform(transforms.identity_transform, constraint.event_dim)


class MatrixNormal(Distribution):
    """A random matrix ``M [K, C]`` with mean ``R`` and covariance ``V ⊗ U``: ``U`` between rows, ``V`` between columns.

    ``log p(M) = −½ [KC ln 2π + C ln|U| + K ln|V| + tr(V⁻¹ (M − R)ᵀ U⁻¹ (M − R))]``

    Stacked by columns, ``vec(M) ~ N(vec R, V ⊗ U)``; torch's row-major ``M.flatten()`` has covariance ``kron(U, V)``.
    With ``V = I`` every column is an independent ``N(R[:, c], U)``, so ``MatrixNormal(*state)`` is the law of a
    :class:`fastkm.MemoryState`. A sample is ``R + chol(U) E chol(V)ᵀ`` with standard normal ``E``. The KC × KC
    covariance is never built.

    Args:
        loc: R ``[..., K, C]``, float32 or float64.
        row_cov: U ``[..., K, K]``, symmetric positive definite.
        col_cov: V ``[..., C, C]``, likewise, or ``None`` for the identity, which costs nothing.
        validate_args: reject NaN in ``loc`` and in the arguments of ``log_prob``; by default on, as in
            :class:`torch.distributions.MultivariateNormal`, but not inside torch.func, torch.compile and other places
            where values cannot be asked. The covariances are factored, hence checked, either way.

    Batch shapes broadcast. ``torch.distributions.kl_divergence`` of two is
    ``½ [tr(V0⁻¹V) tr(U0⁻¹U) + tr(V0⁻¹ΔᵀU0⁻¹Δ) − KC + C (ln|U0| − ln|U|) + K (ln|V0| − ln|V|)]``, ``Δ = R − R0``.

    Numerics: by Cholesky and triangular solves in the dtype given; differentiable in every argument.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: a covariance is not symmetric positive definite; names it and its batch entries.

    Source: Gupta and Nagar, Matrix Variate Distributions (1999), chapter 2.
    """

    arg_constraints = {  # noqa: RUF012  the base class declares it so
        "loc": _RealMatrix(),
        "row_cov": constraints.positive_definite,
        "col_cov": constraints.positive_definite,
    }
    support = _RealMatrix()
    has_rsample = True

    def __init__(
        self, loc: Tensor, row_cov: Tensor, col_cov: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        sizes: dict[str, int] = {}
        check_matrix("loc", loc, "KC", sizes)
        check_matrix("row_cov", row_cov, "KK", sizes, like=("loc", loc))
        if col_cov is not None:
            check_matrix("col_cov", col_cov, "CC", sizes, like=("loc", loc))
        batch_shape = broadcast_batch(loc=loc, row_cov=row_cov, col_cov=col_cov)
        self.loc = loc.expand(batch_shape + loc.shape[-2:])
        self.covariance = KroneckerCovariance(row_cov, col_cov)  # not broadcast: factored once per distinct matrix
        if validate_args is None and not _can_validate(loc):
            validate_args = False
        super().__init__(batch_shape, loc.shape[-2:], validate_args=validate_args)

    # Lazy, so that the base class leaves them alone: factoring has checked them, and a V of None has nothing to check.
    @lazy_property
    def row_cov(self) -> Tensor:
        """U ``[..., K, K]``, broadcast to the batch shape."""
        return self.covariance.row_cov.expand((*self.batch_shape, -1, -1))

    @lazy_property
    def col_cov(self) -> Tensor | None:
        """V ``[..., C, C]``, broadcast to the batch shape, or ``None`` for the identity."""
        col_cov = self.covariance.col_cov
        return None if col_cov is None else col_cov.expand((*self.batch_shape, -1, -1))

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Of every entry, ``U[k, k] V[c, c]``."""
        variance = self.covariance.row_cov.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # [..., K, 1]
        if self.covariance.col_cov is not None:
            variance = variance * self.covariance.col_cov.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        return variance.expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008  a Size is immutable
        shape = self._extended_shape(sample_shape)
        return self.loc + self.covariance.color(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        rows, columns = self.event_shape
        check_matrix("value", value, "KC", {"K": rows, "C": columns}, like=("loc", self.loc))
        if self._validate_args and _can_validate(value):
            self._validate_sample(value)
        distance = self.covariance.quadratic_form(value - self.loc)
        return -0.5 * (rows * columns * math.log(2 * math.pi) + self.covariance.logdet(columns) + distance)

    def entropy(self) -> Tensor:
        rows, columns = self.event_shape
        entropy = 0.5 * (rows * columns * (1 + math.log(2 * math.pi)) + self.covariance.logdet(columns))
        return entropy.expand(self.batch_shape)

    def expand(self, batch_shape, _instance=None) -> "MatrixNormal":
        new = self._get_checked_instance(MatrixNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new.covariance = self.covariance
        super(MatrixNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        return f"MatrixNormal(batch_shape: {list(self.batch_shape)}, event_shape: {list(self.event_shape)})"


def _can_validate(value: Tensor) -> bool:
    """Whether torch.distributions can look at ``value``; it does not look through torch.func."""
    return not (is_value_unknown(value) or is_transformed())


@register_kl(MatrixNormal, MatrixNormal)
def _kl_matrix_normal(p: MatrixNormal, q: MatrixNormal) -> Tensor:
    if p.event_shape != q.event_shape:
        raise ValueError(f"q must have event shape {list(p.event_shape)} like p, got {list(q.event_shape)}")
    spread = _spread(p.covariance, q.covariance, p.event_shape[1])
    return 0.5 * (spread + q.covariance.quadratic_form(p.loc - q.loc))


def _spread(p: KroneckerCovariance, q: KroneckerCovariance, columns: int) -> Tensor:
    """``tr(Σ0⁻¹Σ) − KC − ln|Σ0⁻¹Σ|  [...]`` of ``Σ = V ⊗ U``, as a sum of terms that are not negative.

    The factor of Σ relative to that of Σ0 is ``N ⊗ M``, with ``M = L0_U⁻¹L_U`` and ``N = L0_V⁻¹L_V``. It has the
    diagonal entries ``n_c m_k``, and below its diagonal the squared norm ``‖N‖² below(M) + below(N) ‖diag M‖²``.
    """
    ratio, excess, below = relative_factor(p.row_factor, q.row_factor)
    of_rows = below.square().sum((-2, -1))
    if p.col_factor is None and q.col_factor is None:
        return columns * (variance_divergence(ratio, excess).sum(-1) + of_rows)
    identity = torch.eye(columns, dtype=ratio.dtype, device=ratio.device)
    col_factor, prior = (identity if x is None else x for x in (p.col_factor, q.col_factor))
    col_ratio, col_excess, col_below = relative_factor(*torch.broadcast_tensors(col_factor, prior))
    of_columns = col_below.square().sum((-2, -1))
    ratio, excess, col_ratio, col_excess = (
        ratio.unsqueeze(-1), excess.unsqueeze(-1), col_ratio.unsqueeze(-2), col_excess.unsqueeze(-2)
    )  # fmt: skip
    of_diagonal = variance_divergence(ratio * col_ratio, excess + col_excess + excess * col_excess)  # [..., K, C]
    norm = col_ratio.sum((-2, -1)) + of_columns  # ‖N‖²
    return of_diagonal.sum((-2, -1)) + norm * of_rows + of_columns * ratio.sum((-2, -1))
