"""Filtering: one causal pass over a sequence that writes a pattern and answers a query at every step."""

from typing import NamedTuple

from torch import Tensor

from fastkm._runtime import arguments
from fastkm._runtime.call import call, make_result
from fastkm._runtime.operation import Operation
from fastkm._runtime.options import PRECISION_CODES, READ_BEFORE
from fastkm._runtime.results import result
from fastkm.filtering import native, reference
from fastkm.state import MemoryState

__all__ = ["FilterResult", "filter_posterior"]

FILTER_POSTERIOR = Operation(
    "filter_posterior",
    arguments.State("state"),
    arguments.Codes("weights", "BTK"),
    arguments.Codes("values", "BTC"),
    arguments.Codes("queries", "BTK"),
    arguments.PatternVariance("noise_var"),
    arguments.PatternFactor("retention"),
    arguments.MemoryVariance("prior_var"),
    arguments.PatternFactor("forgetting"),
    arguments.Word("read", READ_BEFORE),
    arguments.Mask("mask", "BT"),
    arguments.Word("precision", PRECISION_CODES),
    reference=reference.filter_block,
    native=native.filter_posterior,
    triton="fastkm.filtering.triton",
    factored="state.cov",
)


@result
class FilterResult(NamedTuple):
    """What :func:`filter_posterior` returns."""

    state: MemoryState  # mean [B, K, C], cov [B, K, K], after the last step
    values: Tensor  # [B, T, C], o_t = R_tᵀ q_t
    variance: Tensor  # [B, T], q_tᵀ U_t q_t, of each column of o_t, without the noise
    innovation_var: Tensor  # [B, T], s_t = w_tᵀ U w_t + σ_t², U before the write
    log_evidence: Tensor  # [B], Σ_t ln p(z_t | w_t, what came before), nats


def filter_posterior(
    state: MemoryState,
    weights: Tensor,  # [B, T, K]
    values: Tensor,  # [B, T, C]
    queries: Tensor,  # [B, T, K]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, T]
    *,
    retention: float | Tensor | None = None,  # float, 0-d, [B] or [B, T]
    prior_var: float | Tensor = 1.0,  # float, 0-d or [B]
    forgetting: float | Tensor | None = None,  # float, 0-d, [B] or [B, T]
    read: str = "after",
    mask: Tensor | None = None,  # [B, T], bool
    precision: str = "ieee",
    backend: str | None = None,
) -> FilterResult:
    """Update the memory with a sequence, and read it at every step: an exact Kalman filter as a causal layer.

    Step ``t`` lets the memory decay, writes the pattern ``z_t`` with the weights ``w_t``, and reads with ``q_t``::

        R ← α R    U ← α² U + (1 − α²) u I       with ``retention`` α and ``prior_var`` u
        U ← U / γ                                with ``forgetting`` γ
        a = U w    s = wᵀa + σ²    δ = z − Rᵀw    R ← R + a δᵀ / s    U ← U − a aᵀ / s
        o = Rᵀ q   v = qᵀ U q

    In the words of a transformer ``w`` is a key, ``z`` a value and ``q`` a query. Without decay, with ``R = 0``,
    ``U = Λ⁻¹`` and ``σ² = 1/β`` this is MesaNet's layer. Chunks of steps are computed at once, which equals the steps.
    However a sequence is cut into calls, each of which takes the state that the one before it returned, the results
    are the same up to rounding. ``T = 1`` is one step of decoding.

    Args:
        state: the memory before the sequence; ``cov`` must be symmetric positive definite. A symmetric ``cov`` that is
            not is found where the weights reach a direction in which it is not.
        weights: how much each row of the memory takes part in each pattern.
        values: the patterns.
        queries: what each step reads with.
        noise_var: variance σ² of the observation noise, positive; one for all, one a memory, or one a step.
        retention: α in (0, 1]: before each pattern the memory relaxes towards the prior, which has the mean 0 and the
            covariance ``prior_var I``. It never knows less than the prior.
        prior_var: variance u that retention relaxes to; nothing else uses it.
        forgetting: γ in (0, 1]: exponential forgetting of recursive least squares. The covariance grows where no
            weights reach, by 1/γ a step.
        read: ``"after"`` the pattern of the step is written, or ``"before"``; both are after the decay.
        mask: where False the step neither decays nor writes; its ``innovation_var`` is σ². Its query is read.
        precision: how a GPU may round the products with codes: ``"ieee"`` (float32), ``"tf32x3"`` or ``"tf32"`` (tensor
            cores). Solves and factors are always float32; on a CPU everything is.
        backend: ``"reference"``, ``"native"``, ``"triton"``, or None for the first that can run the call.

    Returns:
        :class:`FilterResult`. No ``variance`` is negative.

    Numerics: float32 or float64, computed in that dtype; beside a float32 memory ``weights``, ``values`` and
    ``queries`` may be bfloat16 or float16. The range of ``wᵀ U w / σ²`` is that of :func:`fastkm.update_posterior`.
    Under ``torch.autocast`` bfloat16 and float16 inputs are computed in float32.
    The gradient for ``state.cov`` is that of a symmetric matrix.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value; both laws of decay.
        torch.linalg.LinAlgError: ``cov`` is not symmetric or not positive definite, an argument is not finite, the
            noise is too small for the new covariance to be held in this dtype, or forgetting has made it too large for
            the dtype; names the memories and the argument.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Kalman, "A new approach to linear filtering and prediction problems", 1960; von Oswald et al., "MesaNet:
    Sequence modeling by locally optimal test-time training", 2025.
    """
    if retention is not None and forgetting is not None:
        raise ValueError("retention and forgetting are two laws of decay; give one of them, not both")
    mean, cov, read_values, variance, innovation_var, log_evidence, _ = call(
        FILTER_POSTERIOR,
        backend,
        state,
        weights,
        values,
        queries,
        noise_var,
        retention,
        prior_var,
        forgetting,
        read,
        mask,
        precision,
    )
    new_state = make_result(MemoryState, (mean, cov))
    return make_result(FilterResult, (new_state, read_values, variance, innovation_var, log_evidence))
