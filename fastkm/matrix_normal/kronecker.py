"""The covariance of a random matrix when rows and columns vary independently of one another: V ⊗ U, never built."""

import torch
from torch import Tensor

from fastkm._runtime.guards import DTYPES, check_layout, dtype_name
from fastkm._runtime.status import NOT_POSITIVE_DEFINITE, raise_failures
from fastkm.matrix_normal.reference import factor_covariance, log_det_of_factor


class KroneckerCovariance:
    """The covariance ``V ⊗ U`` of a random matrix ``X [K, C]``: ``U`` between rows, ``V`` between columns.

    ``(V ⊗ U) vec X = vec(U X Vᵀ)``, with ``vec`` stacking columns; torch's row-major ``X.flatten()`` has the covariance
    ``kron(U, V)``. Two small Cholesky factors, ``U = L_U L_Uᵀ`` and ``V = L_V L_Vᵀ``, computed once here, serve
    everything; the KC × KC matrix is never built.

    Args:
        row_cov: U ``[..., K, K]``, symmetric positive definite, float32 or float64.
        col_cov: V ``[..., C, C]``, likewise; batch shapes broadcast. ``None`` is the identity of any size C, at no
            cost: every method then works on the rows alone.

    Numerics: computed in the dtype given, differentiable in U, V and X. Errors grow with the condition numbers of U and
    V separately, not with that of V ⊗ U as one matrix.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
        torch.linalg.LinAlgError: a covariance is not symmetric positive definite; names it and its batch entries.
    """

    def __init__(self, row_cov: Tensor, col_cov: Tensor | None = None) -> None:
        self._sizes: dict[str, int] = {}
        self.row_cov = check_matrix("row_cov", row_cov, "KK", self._sizes)
        self.col_cov = col_cov
        if col_cov is not None:
            check_matrix("col_cov", col_cov, "CC", self._sizes, like=("row_cov", row_cov))
        self.batch_shape = broadcast_batch(row_cov=row_cov, col_cov=col_cov)
        self.row_factor = _factor("row_cov", row_cov)  # L_U [..., K, K]
        self.col_factor = None if col_cov is None else _factor("col_cov", col_cov)  # L_V [..., C, C]

    def matvec(self, x: Tensor) -> Tensor:
        """``U X Vᵀ`` for ``x [..., K, C]``."""
        product = self.row_cov @ self._checked(x)
        return product if self.col_cov is None else product @ self.col_cov.mT

    def solve(self, x: Tensor) -> Tensor:
        """``U⁻¹ X V⁻¹``, which undoes :meth:`matvec`, for ``x [..., K, C]``."""
        solution = torch.cholesky_solve(self._checked(x), self.row_factor)
        return solution if self.col_factor is None else torch.cholesky_solve(solution.mT, self.col_factor).mT

    def color(self, x: Tensor) -> Tensor:
        """``L_U X L_Vᵀ``: gives independent standard normal entries ``x [..., K, C]`` this covariance."""
        colored = self.row_factor @ self._checked(x)
        return colored if self.col_factor is None else colored @ self.col_factor.mT

    def whiten(self, x: Tensor) -> Tensor:
        """``L_U⁻¹ X L_V⁻ᵀ``, which undoes :meth:`color`, for ``x [..., K, C]``."""
        white = torch.linalg.solve_triangular(self.row_factor, self._checked(x), upper=False)
        if self.col_factor is None:
            return white
        return torch.linalg.solve_triangular(self.col_factor.mT, white, upper=True, left=False)

    def quadratic_form(self, x: Tensor) -> Tensor:
        """``tr(V⁻¹ Xᵀ U⁻¹ X) [...]``, the squared norm of the whitened ``x [..., K, C]``."""
        return self.whiten(x).square().sum((-2, -1))

    def logdet(self, num_columns: int | None = None) -> Tensor:
        """``ln|V ⊗ U| = C ln|U| + K ln|V|  [...]``. ``num_columns`` is C; an identity V does not know its size."""
        rows, columns = self._sizes["K"], self._sizes.get("C", num_columns)
        if columns is None:
            raise ValueError("num_columns must be given when col_cov is None, got None")
        if num_columns is not None and num_columns != columns:
            raise ValueError(f"num_columns must be {columns} like col_cov, got {num_columns}")
        of_rows = columns * log_det_of_factor(self.row_factor)
        return of_rows if self.col_factor is None else of_rows + rows * log_det_of_factor(self.col_factor)

    def _checked(self, x: Tensor) -> Tensor:
        return check_matrix("x", x, "KC", dict(self._sizes), like=("row_cov", self.row_cov))

    def __repr__(self) -> str:
        col_cov = None if self.col_cov is None else list(self.col_cov.shape)
        return f"KroneckerCovariance(row_cov: {list(self.row_cov.shape)}, col_cov: {col_cov})"


def check_matrix(
    name: str, value: Tensor, letters: str, sizes: dict[str, int], like: tuple[str, Tensor] | None = None
) -> Tensor:
    """Hold ``value`` to ``[..., *letters]`` and to the dtype and device of ``like``; ``sizes`` learns new letters."""
    shape = f"[..., {', '.join(letters)}]"
    if known := ", ".join(f"{letter} = {sizes[letter]}" for letter in dict.fromkeys(letters) if letter in sizes):
        shape += f" with {known}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    check_layout(name, value)
    if like is None and value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32 or float64, got {dtype_name(value.dtype)}")
    if like is not None and value.dtype != like[1].dtype:
        raise TypeError(f"{name} must be {dtype_name(like[1].dtype)} like {like[0]}, got {dtype_name(value.dtype)}")
    if like is not None and value.device != like[1].device:
        raise ValueError(f"{name} must be on {like[1].device} like {like[0]}, got {value.device}")
    if value.dim() < 2 or any(
        sizes.setdefault(letter, size) != size for letter, size in zip(letters, value.shape[-2:], strict=True)
    ):
        raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
    return value


def broadcast_batch(**matrices: Tensor | None) -> torch.Size:
    """The common batch shape of the named matrices."""
    shapes = {name: matrix.shape[:-2] for name, matrix in matrices.items() if matrix is not None}
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        got = " and ".join(f"{list(shape)} of {name}" for name, shape in shapes.items())
        raise ValueError(f"batch shapes must broadcast, got {got}") from None


def _factor(name: str, cov: Tensor) -> Tensor:
    """The lower Cholesky factor of a symmetric positive definite matrix [..., n, n], or an error with its entries."""
    flat = cov.flatten(0, -3) if cov.dim() > 2 else cov.unsqueeze(0)  # by sizes that a trace keeps symbolic
    factor, info = factor_covariance(flat)
    info = torch.where(flat.isfinite().all(-1).all(-1), info, NOT_POSITIVE_DEFINITE)  # the factor reads one triangle
    raise_failures(
        info.reshape(cov.shape[:-2]), name, lambda failed: f" in batch entries {failed}" if failed[0] != [] else ""
    )
    return factor.reshape(cov.shape)
