"""Addressing: the weights over a memory's rows that explain a query."""

from collections.abc import Callable

from torch import Tensor

from fastkm._runtime import dispatch, guards
from fastkm._runtime.autocast import in_float32
from fastkm.addressing import native, reference

__all__ = ["METHODS", "SQUARED_GRAM", "solve_addressing"]

SQUARED_GRAM = {"ridge": False, "deepmind": True}  # method -> what the operators take
METHODS = tuple(SQUARED_GRAM)
_RUN: dict[str, Callable] = {
    "reference": reference.solve_addressing,
    "native": native.solve_addressing,
    "triton": dispatch.on_first_use("fastkm.addressing.triton", "solve_addressing"),
}


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

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: the regularised Gram matrix is not positive definite in this dtype.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Wu et al., NeurIPS 2018, eq. 8.
    """
    outputs = dispatch.straight(
        native.solve_addressing, backend, mean, queries, ridge, guards.meaning(method, SQUARED_GRAM)
    )
    if outputs is None:
        outputs = _guarded(mean, queries, ridge, method, backend)
    return outputs[0]


@in_float32
def _guarded(mean, queries, ridge, method, backend) -> tuple[Tensor, ...]:
    check = guards.Signature()
    mean = check.tensor("mean", mean, "BKC")
    queries = check.tensor("queries", queries, "BQC", low_precision=True)
    ridge = check.per_memory("ridge", ridge)
    guards.choice("method", method, METHODS)
    backend = dispatch.resolve("solve_addressing", backend, mean, queries, ridge)
    (queries,) = dispatch.accepted(backend, mean, queries)
    outputs = _RUN[backend](mean, queries, ridge, SQUARED_GRAM[method])
    guards.factored(outputs[-1], "mean meanᵀ + ridge I")
    return outputs
