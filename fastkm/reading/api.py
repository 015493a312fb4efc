"""Reading: address the memory with a query and decode the weights, once or again and again."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkm._runtime import arguments, guards
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.call import call, make_result
from fastkm._runtime.operation import Operation
from fastkm._runtime.options import PRECISION_CODES, SQUARED_GRAM
from fastkm._runtime.results import result
from fastkm.reading import native, reference
from fastkm.state import AddressingFactor, MemoryState

__all__ = ["AttractorResult", "ReadResult", "attractor_read", "read", "read_factored"]

READ = Operation(
    "read",
    arguments.Matrix("mean", "BKC"),
    arguments.Codes("queries", "BQC"),
    arguments.MemoryVariance("ridge"),
    arguments.Count("num_iters"),
    arguments.Word("method", SQUARED_GRAM),
    arguments.Word("precision", PRECISION_CODES),
    arguments.CodeDtype("out_dtype"),
    reference=reference.read,
    native=native.read,
    triton="fastkm.reading.triton",
    factored="mean meanᵀ + ridge I",
)
READ_FACTORED = Operation(
    "read_factored",
    *arguments.FACTOR_AND_QUERIES,
    arguments.Count("num_iters"),
    arguments.Word("precision", PRECISION_CODES),
    arguments.CodeDtype("out_dtype"),
    reference=reference.read_factored,
    native=native.read_factored,
    triton="fastkm.reading.triton",
)
ATTRACTOR_READ = Operation(
    "attractor_read",
    arguments.State("state"),
    arguments.Codes("queries", "BQC"),
    arguments.MemoryVariance("noise_var"),
    arguments.MemoryVariance("ridge"),
    arguments.Count("num_iters"),
    arguments.OptionalVariance("weight_var"),
    arguments.Number("tol", optional=True),
    arguments.Codec("clean"),
    reference=reference.attractor_read,
    native=native.attractor_read,
    triton="fastkm.reading.triton",
    factored="mean meanᵀ + ridge I",
)


@result
class ReadResult(NamedTuple):
    """What :func:`read` returns."""

    values: Tensor  # [B, Q, C], Rᵀ w
    weights: Tensor  # [B, Q, K]


@result
class AttractorResult(NamedTuple):
    """What :func:`attractor_read` returns."""

    values: Tensor  # [B, Q, C], Rᵀ w of each query's last iteration
    weights: Tensor  # [B, Q, K]
    energy: Tensor  # [B, Q, n], nats; a query that stopped keeps its last energy
    num_iters: Tensor  # [B, Q], int64, the iterations each query took


def read(
    mean: Tensor,  # [B, K, C]
    queries: Tensor,  # [B, Q, C]
    ridge: float | Tensor,  # float, 0-d or [B]
    *,
    num_iters: int = 1,
    method: str = "ridge",
    precision: str = "ieee",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> ReadResult:
    """Read the memory: solve for the weights of each query and return what they stand for.

    One read is ``w = (R Rᵀ + λI)⁻¹ R z``, ``ẑ = Rᵀ w``; with ``num_iters = n`` the output is fed back n − 1 times.
    Without a codec this is a linear map that stays in K, with ``A = R Rᵀ + λI`` factored once::

        w₁ = A⁻¹ R z        w_{i+1} = A⁻¹ (R Rᵀ w_i) = w_i − λ A⁻¹ w_i        ẑ = Rᵀ w_n

    Each further iteration shrinks the read-out (mode i by g_i/(g_i + λ)): it does not clean anything up. For clean-up,
    put the codec in the loop with :func:`attractor_read`.

    Args:
        mean: the memory ``R``.
        queries: the cues ``z``.
        ridge: λ = σ²/σ0²; positive.
        num_iters: n, at least 1.
        method: ``"ridge"``, or ``"deepmind"`` for the released code's squared-Gram solve (parity only).
        precision: how a GPU may round the products with codes: ``"ieee"`` (float32), ``"tf32x3"`` or ``"tf32"`` (tensor
            cores). Solves and factors are always float32; on a CPU everything is.
        out_dtype: of the values: that of ``mean``, which None means, or bfloat16 or float16 beside float32, to which
            they are rounded once.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None.

    Returns:
        :class:`ReadResult` in the dtype of ``mean`` (float32 or float64), which is also the compute dtype; beside
        float32 ``queries`` may be bfloat16 or float16. The native kernels convert them tile by tile.
        Under ``torch.autocast`` bfloat16 and float16 inputs are computed in float32.
        Second derivatives are those of the reference form, at its cost.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: the regularised Gram matrix is not positive definite in this dtype.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Wu et al., NeurIPS 2018, section 3.2, with the identity as codec.
    """
    if out_dtype is None:
        values, weights, _ = call(READ, backend, mean, queries, ridge, num_iters, method, precision)
    else:
        values, weights, _ = call(READ, backend, mean, queries, ridge, num_iters, method, precision, out_dtype)
    return make_result(ReadResult, (values, weights))


def read_factored(
    factor: AddressingFactor,
    queries: Tensor,  # [B, Q, C]
    *,
    num_iters: int = 1,
    precision: str = "ieee",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> ReadResult:
    """Read with what :func:`fastkm.factor_addressing` computed once: :func:`read` without its factorisation.

    ``w₁ = z R⁺``, ``w_{i+1} = w_i − λ A⁻¹ w_i``, ``ẑ = Rᵀ w_n``, with the regularised pseudo-inverse ``R⁺`` and the
    factor of ``A``. One iteration reads ``R⁺`` and ``R``, 2KC numbers, where :func:`read` computes K²C + K³/3.

    >>> factor = fastkm.factor_addressing(state.mean, ridge)
    >>> for cue in cues:                                             # [1, 1, C] each
    ...     answer = fastkm.read_factored(factor, cue).values

    Args:
        factor: of the memories that are read. It holds ``method`` and ``ridge``.
        queries: the cues ``z``.
        num_iters: n, at least 1, as in :func:`read`. Every further iteration is two triangular solves.
        precision: as in :func:`read`.
        out_dtype: of the values, as in :func:`read`.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None. It need not be the one that made the factor.

    Returns:
        :class:`ReadResult`, with dtypes as in :func:`read`; ``factor.mean`` takes the place of ``mean``. Gradients go
        to ``queries``, ``factor.mean`` and ``factor.ridge``, and through these to what the factor was made of, as if
        each read factored anew. Second derivatives are those of the reference form, at its cost.
        On a CPU the result for a query depends neither on the other memories nor on the number of threads, and, for
        one iteration, not on the other queries.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value; queries that do not fit the
            memory of the factor.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Wu et al., NeurIPS 2018, section 3.2, with the identity as codec.
    """
    mean, ridge, lower, pseudoinverse, gram = guards.factor(factor)
    values, weights, _ = call(
        READ_FACTORED, backend, mean, queries, ridge, lower, pseudoinverse, gram, num_iters, precision, out_dtype
    )
    return make_result(ReadResult, (values, weights))


@in_float32
def attractor_read(
    state: MemoryState,
    queries: Tensor,  # [B, Q, C]
    noise_var: float | Tensor,  # float, 0-d or [B]
    ridge: float | Tensor,  # float, 0-d or [B]
    *,
    clean: Callable[[Tensor], Tensor],
    num_iters: int,
    weight_var: float | Tensor = 0.0,  # float, 0-d or [B]
    tol: float | None = None,
    backend: str | None = None,
) -> AttractorResult:
    """Clean queries up by iterating: address, decode, pass the result through a codec, address again.

    ``w_i = (R Rᵀ + λI)⁻¹ R x_i``, ``ẑ_i = Rᵀ w_i``, ``x_{i+1} = clean(ẑ_i)``. The Gram matrix is factored once. The
    energy of every iteration is the negative expected log-likelihood under q(M) plus the cost of the weights::

        E(x, w) = [ C ln 2πσ² + ( ‖x − Rᵀw‖² + C wᵀUw + σw² (‖R‖² + C tr U) ) / σ² ] / 2  +  cost(w)

    where ``cost`` is ``KL(N(w, σw²I) ‖ N(0, σ0²I))`` of :func:`fastkm.kl_weights` with ``σ0² = σ²/λ``, or, for a point
    estimate (σw² = 0, whose KL is infinite), ``−ln N(w | 0, σ0²I)``. The address step minimises this energy for U = 0,
    and nearly so for a small U; a codec trained on the stored patterns lowers it further.

    Args:
        state: the memory; ``cov`` enters the energy only.
        queries: corrupted codes; beside a float32 memory they may be bfloat16 or float16.
        noise_var: σ².
        ridge: λ.
        clean: any callable from codes to codes of the same shape ``[B, Q, C]`` (encode after decode), applied between
            reads.
        num_iters: the most iterations, n.
        weight_var: σw² of q(w), a number of at least 0, or a positive tensor.
        tol: stop a query once the root mean square of ``ẑ_i − ẑ_{i−1}`` over its C entries is at most ``tol``; the
            queries that are left go on.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None. On a GPU every backend runs all ``num_iters``
            iterations and waits for nothing, so that the call can be captured in a CUDA graph. Elsewhere the loop ends
            with the last query, and the kernels do not read settled queries again once they are half of a memory's.

    Returns:
        :class:`AttractorResult`. Gradients go through all iterations of each query, and through ``clean``; for that of
        the last iteration alone, run the others under ``torch.no_grad()`` and start again from ``clean(values)`` with
        ``num_iters=1``. Under ``torch.autocast`` bfloat16 and float16 inputs are computed in float32;
        ``clean`` itself runs under autocast.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value, or a ``clean`` that changes
            the shape, dtype or device.
        torch.linalg.LinAlgError: the regularised Gram matrix is not positive definite in this dtype.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Wu et al., NeurIPS 2018, section 3.2 and eq. 12.
    """
    values, weights, energy, taken, _ = call(
        ATTRACTOR_READ, backend, state, queries, noise_var, ridge, num_iters, weight_var, tol, clean
    )
    return AttractorResult(values, weights, energy, taken)
