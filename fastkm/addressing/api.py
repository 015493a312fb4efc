"""Addressing: the weights over a memory's rows that explain a query."""

import torch
from torch import Tensor

from fastkm._runtime import arguments, guards
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.call import call
from fastkm._runtime.operation import Operation
from fastkm._runtime.options import SQUARED_GRAM
from fastkm.addressing import native, reference
from fastkm.state import AddressingFactor

__all__ = ["factor_addressing", "solve_addressing", "solve_factored"]

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

FACTOR_ADDRESSING = Operation(
    "factor_addressing",
    arguments.Matrix("mean", "BKC"),
    arguments.MemoryVariance("ridge"),
    arguments.Word("method", SQUARED_GRAM),
    reference=reference.factor_addressing,
    native=native.factor_addressing,
    triton="fastkm.addressing.triton",
    factored="mean meanᵀ + ridge I",
)
SOLVE_FACTORED = Operation(
    "solve_factored",
    *arguments.FACTOR_AND_QUERIES,
    reference=reference.solve_factored,
    native=native.solve_factored,
    triton="fastkm.addressing.triton",
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


@in_float32
def factor_addressing(
    mean: Tensor,  # [B, K, C]
    ridge: float | Tensor,  # float, 0-d or [B]
    *,
    method: str = "ridge",
    backend: str | None = None,
) -> AddressingFactor:
    """Compute once what addressing a memory needs, for queries that come one after the other.

    ``A = R Rᵀ + λI`` is factored, and the regularised pseudo-inverse ``R⁺ = Rᵀ A⁻¹`` is solved for. Then the weights
    of a query are ``w = z R⁺``: :func:`solve_factored` and :func:`fastkm.read_factored` cost what reading ``R⁺`` and
    ``R`` costs. ``R⁺`` holds as many digits as a solve for each query.

    Args:
        mean: the memory ``R``, float32 or float64, which is also the compute dtype.
        ridge: λ = σ²/σ0²; positive.
        method: ``"ridge"``, or ``"deepmind"`` as in :func:`fastkm.solve_addressing`: ``A = G² + λI``,
            ``R⁺ = Rᵀ G A⁻¹`` with ``G = R Rᵀ``.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None.

    Returns:
        :class:`fastkm.AddressingFactor`. It has copies of ``mean`` and ``ridge``: when the memory changes, the factor
        still answers for the memory that it was made of. Its ``mean`` and ``ridge`` pass gradients on to the arguments;
        what is solved or read with the factor has the gradient for them that it would have if it factored anew.
        ``lower``, ``pseudoinverse`` and ``gram`` have no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: the regularised Gram matrix is not positive definite in this dtype.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Wu et al., NeurIPS 2018, eq. 8.
    """
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in (mean, ridge)]
    pseudoinverse, lower, gram, _ = call(FACTOR_ADDRESSING, backend, *inputs, method)
    if isinstance(ridge, Tensor):
        ridges = ridge.expand(mean.shape[:1]).clone()
    else:
        ridges = mean.new_full(mean.shape[:1], guards.number("ridge", ridge))
    copy = mean.clone(memory_format=torch.contiguous_format)
    return AddressingFactor(copy, ridges, lower, pseudoinverse, gram)


def solve_factored(
    factor: AddressingFactor,
    queries: Tensor,  # [B, Q, C]
    *,
    backend: str | None = None,
) -> Tensor:
    """The weights of queries from a factor: :func:`fastkm.solve_addressing` without its factorisation.

    ``w = z R⁺``, with ``R⁺`` of :func:`factor_addressing`.

    Args:
        factor: of the memories that are addressed.
        queries: any number of queries ``z`` a memory.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None. It need not be the one that made the factor.

    Returns:
        weights ``[B, Q, K]`` in the dtype of ``factor.mean``; beside float32 ``queries`` may be bfloat16 or float16.
        Under ``torch.autocast`` bfloat16 and float16 inputs are computed in float32. Gradients go to ``queries``,
        ``factor.mean`` and ``factor.ridge``, and through these to what the factor was made of. Second derivatives are
        those of the reference form, at its cost.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value; queries that do not fit the
            memory of the factor.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Wu et al., NeurIPS 2018, eq. 8.
    """
    mean, ridge, lower, pseudoinverse, gram = guards.factor(factor)
    return call(SOLVE_FACTORED, backend, mean, queries, ridge, lower, pseudoinverse, gram)[0]
