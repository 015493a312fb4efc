"""Matrix-normal mathematics: divergences, the distribution, and Kronecker-structured covariances."""

from torch import Tensor

from fastkm._runtime import arguments, guards
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.call import call
from fastkm._runtime.operation import Operation
from fastkm.matrix_normal import native, reference
from fastkm.matrix_normal.distribution import MatrixNormal
from fastkm.matrix_normal.kronecker import KroneckerCovariance
from fastkm.state import MemoryState

__all__ = ["KroneckerCovariance", "MatrixNormal", "kl_memory", "kl_weights", "logdet"]

KL_MEMORY = Operation(
    "kl_memory",
    arguments.State("state"),
    arguments.State("prior"),
    reference=reference.kl_memory,
    native=native.kl_memory,
    triton="fastkm.matrix_normal.triton",
    factored="state.cov or prior.cov",
)
KL_MEMORY_DEEPMIND = Operation(
    "kl_memory_deepmind",
    arguments.State("state"),
    arguments.State("prior"),
    reference=reference.kl_memory_deepmind,
)
LOGDET = Operation(
    "logdet",
    arguments.Matrix("cov", "BKK"),
    reference=reference.logdet,
    native=native.logdet,
    triton="fastkm.matrix_normal.triton",
    factored="cov",
)


@in_float32
def kl_weights(weights: Tensor, weight_var: float | Tensor, prior_var: float | Tensor) -> Tensor:
    """KL(N(w, σw² I) ‖ N(0, σ0² I)) in nats: the cost of the weights of a pattern.

    ``½ [ K σw²/σ0² + ‖w‖²/σ0² − K + K ln(σ0²/σw²) ]``

    Args:
        weights: ``[..., K]``, the means w.
        weight_var: σw², positive; a float or a tensor that broadcasts against ``[...]``.
        prior_var: σ0², positive; likewise.

    Returns:
        ``[...]``. Under ``torch.autocast`` bfloat16 and float16 inputs are computed in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or value.

    Source: Wu et al., NeurIPS 2018, eq. 12.
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point() or weights.dim() == 0:
        got = (
            f"{weights.dtype} of shape {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        )
        raise TypeError(f"weights must be a floating-point tensor of shape [..., K], got {got}")
    weight_var = _spreading("weight_var", weight_var, weights)
    prior_var = _spreading("prior_var", prior_var, weights)
    return reference.kl_weights(weights, weight_var, prior_var)


def _spreading(name: str, value: float | Tensor, weights: Tensor) -> Tensor:
    """A positive variance that broadcasts against the vectors ``weights [..., K]`` without making more of them."""
    value, vectors = guards.positive_like(name, value, weights), weights.shape[:-1]
    fits = value.dim() <= len(vectors) and all(
        size in (1, other) for size, other in zip(reversed(value.shape), reversed(vectors), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must be a float or broadcast to [...] = {list(vectors)}, got {list(value.shape)}")
    return value


def kl_memory(state: MemoryState, prior: MemoryState, *, method: str = "exact", backend: str | None = None) -> Tensor:
    """KL(q(M) ‖ p(M)) of two memories in nats, ``[B]``.

    ``½ [ C tr(U0⁻¹U) + tr((R − R0)ᵀ U0⁻¹ (R − R0)) − KC + C (ln|U0| − ln|U|) ]``

    Args:
        state: q(M), mean ``R [B, K, C]`` and covariance ``U [B, K, K]``.
        prior: p(M), ``R0`` and ``U0`` of the same shapes.
        method: ``"exact"``, or ``"deepmind"`` for parity with the released code, which uses the diagonals only and
            leaves out the ½.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None; ``"deepmind"`` has the reference only.

    Under ``torch.autocast`` bfloat16 and float16 inputs are computed in float32.
    Second derivatives are those of the reference form, at its cost.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: a covariance is not symmetric positive definite; names the memories.

    Source: the KL of two matrix normals; Wu et al., NeurIPS 2018, eq. 9.
    """
    if method == "deepmind":
        return call(KL_MEMORY_DEEPMIND, backend, state, prior)
    if method != "exact":
        guards.choice("method", method, ("exact", "deepmind"))
    return call(KL_MEMORY, backend, state, prior)[0]


def logdet(cov: Tensor, *, backend: str | None = None) -> Tensor:
    """``ln|U|`` of every covariance, from its Cholesky diagonal: ``2 Σ_k ln L_kk`` with ``U = L Lᵀ``.

    Args:
        cov: U ``[B, K, K]``, symmetric positive definite, float32 or float64.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None.

    Returns:
        ``[B]``; 0 for an empty matrix.

    Numerics: computed in the dtype given, under autocast in float32. The determinant itself is never
    formed, so it neither over- nor underflows. Second derivatives are those of the reference form, at its cost.

    Raises:
        TypeError, ValueError: ``cov`` is of the wrong kind, dtype or shape.
        torch.linalg.LinAlgError: ``cov`` is not symmetric positive definite; names the memories.
        fastkm.BackendUnavailableError: the named backend cannot run this call.
    """
    return call(LOGDET, backend, cov)[0]
