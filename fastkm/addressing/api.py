"""Addressing: the weights over a memory's rows that explain a query."""

from torch import Tensor

from fastkm._runtime import arguments
from fastkm._runtime.call import call
from fastkm._runtime.operation import Operation
from fastkm._runtime.options import SQUARED_GRAM
from fastkm.addressing import native, reference

__all__ = ["solve_addressing"]

SOLVE_ADDRESSING = Operation(
    "solve_addressing",
    arguments.Matrix("mean", "BKC"),
    arguments.Codes("queries", "BQC"),
    arguments.MemoryVariance("ridge"),
    arguments.Word("method", SQUARED_GRAM),
    reference=reference.solve_addressing,
    native=native.solve_addressing,
    triton="fastkm.addressing.triton",
    factored="mean meanᵀ + ridge I",
)


def solve_addressing(
    mean: Tensor,  # [B, K, C]
    queries: Tensor,  # [B, Q, C]
    ridge: float | Tensor,  # float, 0-d or [B]
    *,
    method: str = "ridge",
    backend: str | None = None,
) -> Tensor:
    """The weights that explain each query best: regularised least squares, one factorisation a memory.

    ``w = argmin ‖z − Rᵀw‖² + λ ‖w‖²``, hence ``(R Rᵀ + λI) w = R z``.

    Args:
        mean: the memory ``R``.
        queries: any number of queries ``z`` a memory.
        ridge: λ = σ²/σ0², observation-noise variance over prior variance of the weights; positive.
        method: ``"ridge"``, or ``"deepmind"`` for parity with the released DeepMind code, which solves
            ``(G² + λI) w = G R z`` with ``G = R Rᵀ``: other weights, and a squared condition number.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None.

    Returns:
        weights ``[B, Q, K]``, in the dtype of ``mean`` (float32 or float64), which is also the compute dtype; beside
        float32 ``queries`` may be bfloat16 or float16.
        Under ``torch.autocast`` bfloat16 and float16 inputs are computed in float32.
        Second derivatives are those of the reference form, at its cost.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: the regularised Gram matrix is not positive definite in this dtype.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Wu et al., NeurIPS 2018, eq. 8.
    """
    return call(SOLVE_ADDRESSING, backend, mean, queries, ridge, method)[0]
