"""Writing an episode: address and update, one pattern after the other."""

from typing import NamedTuple

from torch import Tensor

from fastkm._runtime import arguments
from fastkm._runtime.call import call, make_result
from fastkm._runtime.operation import Operation
from fastkm._runtime.options import PRECISION_CODES, SQUARED_GRAM
from fastkm._runtime.out import OperationInto, call_into
from fastkm._runtime.results import result
from fastkm.state import MemoryState
from fastkm.writing import native, reference

__all__ = ["WriteResult", "write"]

WRITE = Operation(
    "write",
    arguments.State("state"),
    arguments.Codes("values", "BTC"),
    arguments.PatternVariance("noise_var"),
    arguments.MemoryVariance("ridge"),
    arguments.Count("num_opt_iters"),
    arguments.Word("method", SQUARED_GRAM),
    arguments.Mask("mask", "BT"),
    arguments.Word("precision", PRECISION_CODES),
    reference=reference.write_sequential,
    native=native.write,
    triton="fastkm.writing.triton",
    factored="state.cov",
)
WRITE_INTO = OperationInto(WRITE, native.write_into)


@result
class WriteResult(NamedTuple):
    """What :func:`write` returns."""

    state: MemoryState  # mean [B, K, C], cov [B, K, K]
    weights: Tensor  # [B, T, K], the weights each pattern was written with; 0 where masked
    innovation_var: Tensor  # [B, T]
    kl: Tensor  # [B, T], nats


def write(
    state: MemoryState,
    values: Tensor,  # [B, T, C]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, T]
    ridge: float | Tensor,  # float, 0-d or [B]
    *,
    num_opt_iters: int = 1,
    method: str = "ridge",
    mask: Tensor | None = None,  # [B, T], bool
    precision: str = "ieee",
    out: MemoryState | None = None,
    backend: str | None = None,
) -> WriteResult:
    """Write an episode as the Dynamic Kanerva Machine does: each pattern is addressed, then stored.

    For ``t = 1 … T``: solve ``(R Rᵀ + λI) w = R z_t`` against the current mean, then update mean and covariance
    with ``w`` as in :func:`fastkm.update_posterior`. Because ``w_t`` depends on what was written before it, this
    differs from solving all weights against the first mean.

    Args:
        state: memory before the episode. A zero mean stays zero: its weights are zero.
        values: the patterns, in order.
        noise_var: variance σ² of the observation noise; one for all, one a memory, or one a pattern.
        ridge: λ = σ²/σ0² of the addressing solve.
        num_opt_iters: with n > 1, each pattern's weights are solved n times, each time against the mean that the
            previous weights would give; the update always starts from the mean before the pattern.
        method: ``"ridge"``, or ``"deepmind"`` for the released code's squared-Gram solve (parity only).
        mask: where False the pattern changes nothing; its weights and ``kl`` are 0, its ``innovation_var`` is σ².
        precision: how a GPU may round the products with codes: ``"ieee"`` (float32), ``"tf32x3"`` or ``"tf32"`` (tensor
            cores). Solves and factors are always float32; on a CPU everything is.
        out: the memory that the new state is written into, which may be ``state``: then it is updated in place. See
            below.
        backend: ``"reference"``, ``"native"``, ``"triton"`` or None.

    Returns:
        :class:`WriteResult`; the mean of q(w) is written, its variance plays no part.

    Numerics: float32 or float64, computed in that dtype; beside a float32 memory ``values`` may be bfloat16 or float16.
    Kernels work in Gram space, which loses digits when patterns nearly repeat or λ is small against their energy. The
    native kernel computes such a float32 memory again in float64, so that it is as accurate as the literal loop.
    Under ``torch.autocast`` bfloat16 and float16 inputs are computed in float32.
    The gradient for ``state.cov`` is that of a symmetric matrix. Second derivatives are those of the reference form, at
    its cost.

    With ``out`` the result's ``state`` is ``out`` and no gradient is computed. ``out.mean`` is ``state.mean`` itself or
    shares no memory with an argument; likewise ``out.cov``; what is written inside :func:`torch.compile` is not checked
    for it. A memory that is refused comes out as it came in. A write works on a copy of the memory all the same;
    :class:`fastkm.MemoryStream` does not.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: ``state.cov`` is not symmetric positive definite, or the Gram matrix cannot be
            factored in this dtype; names the memories.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Wu et al., NeurIPS 2018, algorithm 1.
    """
    if out is not None:
        new, reports = call_into(
            WRITE_INTO, backend, out, state, values, noise_var, ridge, num_opt_iters, method, mask, precision
        )
        return make_result(WriteResult, (new, *reports))
    mean, cov, weights, innovation_var, kl, _ = call(
        WRITE, backend, state, values, noise_var, ridge, num_opt_iters, method, mask, precision
    )
    return make_result(WriteResult, (make_result(MemoryState, (mean, cov)), weights, innovation_var, kl))
