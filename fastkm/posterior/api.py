"""Posterior update of a memory when the weights of every pattern are given."""

from typing import NamedTuple

from torch import Tensor

from fastkm._runtime import arguments
from fastkm._runtime.call import call, make_result
from fastkm._runtime.operation import Operation
from fastkm._runtime.options import PRECISION_CODES
from fastkm._runtime.out import OperationInto, call_into
from fastkm._runtime.results import result
from fastkm.posterior import native, reference
from fastkm.state import MemoryState

__all__ = ["PosteriorUpdate", "update_posterior"]

UPDATE_POSTERIOR = Operation(
    "update_posterior",
    arguments.State("state"),
    arguments.Codes("weights", "BTK"),
    arguments.Codes("values", "BTC"),
    arguments.PatternVariance("noise_var"),
    arguments.Mask("mask", "BT"),
    arguments.Word("precision", PRECISION_CODES),
    reference=reference.update_block,
    native=native.update_posterior,
    triton="fastkm.posterior.triton",
    factored="state.cov",
)
UPDATE_POSTERIOR_INTO = OperationInto(UPDATE_POSTERIOR, native.update_posterior_into)


@result
class PosteriorUpdate(NamedTuple):
    """What :func:`update_posterior` returns."""

    state: MemoryState  # mean [B, K, C], cov [B, K, K]
    innovation_var: Tensor  # [B, T], s_t = w_tᵀ U_{t−1} w_t + σ²
    kl: Tensor  # [B, T], KL(posterior after pattern t ‖ posterior before it), nats
    log_evidence: Tensor  # [B], ln p(values | weights), nats


def update_posterior(
    state: MemoryState,
    weights: Tensor,  # [B, T, K]
    values: Tensor,  # [B, T, C]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, T]
    *,
    mask: Tensor | None = None,  # [B, T], bool
    precision: str = "ieee",
    out: MemoryState | None = None,
    backend: str | None = None,
) -> PosteriorUpdate:
    """Condition the memory on ``values = weights @ M + noise``: Bayesian linear regression, exactly.

    One pattern ``z`` with weights ``w`` changes the mean ``R`` and covariance ``U`` by::

        a = U w    s = wᵀa + σ²    δ = z − Rᵀw    R' = R + a δᵀ / s    U' = U − a aᵀ / s

    ``T`` patterns are applied at once in block form, which equals the ``T`` steps above::

        V = W U    V Wᵀ + σ²I = L Lᵀ    G = L⁻¹ V    E = L⁻¹ (Z − W R)    R' = R + GᵀE    U' = U − GᵀG

    Args:
        state: prior; ``cov`` must be symmetric positive definite. A symmetric ``cov`` that is not is found where the
            weights reach a direction in which it is not.
        weights: how much each row of the memory takes part in each pattern.
        values: the patterns.
        noise_var: variance σ² of the observation noise, positive; one for all, one a memory, or one a pattern.
        mask: where False the pattern changes nothing; its ``kl`` is 0 and its ``innovation_var`` is σ².
        precision: how a GPU may round the products with codes: ``"ieee"`` (float32), ``"tf32x3"`` or ``"tf32"`` (tensor
            cores). Solves and factors are always float32; on a CPU everything is.
        out: the memory that the new state is written into, which may be ``state``: then it is updated in place. See
            below.
        backend: ``"reference"``, ``"native"``, ``"triton"``, or None for the first that can run the call.

    Returns:
        :class:`PosteriorUpdate`. The order of the patterns matters for the per-pattern fields only.

    Numerics: float32 or float64, computed in that dtype; beside a float32 memory ``weights`` and ``values`` may be
    bfloat16 or float16. A pattern with ``wᵀ U w / σ²`` below 1.6e4 in float32, 9e12 in float64, may repeat any number
    of times; beyond, a covariance that rounding could make indefinite is refused. No ``kl`` is negative.
    The CPU kernels compute a float32 memory that loses digits again in float64, and refuse what float32 cannot hold.
    Under ``torch.autocast`` bfloat16 and float16 inputs are computed in float32.
    The gradient for ``state.cov`` is that of a symmetric matrix. Second derivatives are those of the reference form, at
    its cost.

    With ``out`` the result's ``state`` is ``out``, no gradient is computed, and on a CPU no second memory is made: a
    single pattern reads it twice and writes it once. ``out.mean`` is ``state.mean`` itself or shares no memory with an
    argument; likewise ``out.cov``; what is written inside :func:`torch.compile` is not checked for it. A memory that is
    refused comes out as it came in or, with more than 16 patterns, as it was before the 16 to 256 patterns at once that
    were refused. On a GPU, and by the reference, the new memory is computed and then copied.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: ``cov`` is not symmetric or not positive definite, an argument is not finite, or the
            noise is too small for the new covariance to be held in this dtype; names the memories and the argument.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Wu et al., "Learning Attractor Dynamics for Generative Memory", NeurIPS 2018, eq. 6.
    """
    if out is not None:
        new, reports = call_into(
            UPDATE_POSTERIOR_INTO, backend, out, state, weights, values, noise_var, mask, precision
        )
        return make_result(PosteriorUpdate, (new, *reports))
    mean, cov, innovation_var, kl, log_evidence, _ = call(
        UPDATE_POSTERIOR, backend, state, weights, values, noise_var, mask, precision
    )
    return make_result(PosteriorUpdate, (make_result(MemoryState, (mean, cov)), innovation_var, kl, log_evidence))
