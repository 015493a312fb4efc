"""Exact removal of patterns from a memory, as if they had never been written."""

from typing import Any

from torch import Tensor

from fastkm._runtime import arguments
from fastkm._runtime.call import call, make_result
from fastkm._runtime.operation import Operation
from fastkm.removal import native, reference
from fastkm.state import MemoryState

__all__ = ["remove_patterns", "replace_patterns"]

REMOVE_PATTERNS = Operation(
    "remove_patterns",
    arguments.State("state"),
    arguments.Codes("weights", "BTK"),
    arguments.Codes("values", "BTC"),
    arguments.PatternVariance("noise_var"),
    arguments.Mask("mask", "BT"),
    reference=reference.remove_block,
    native=native.remove_patterns,
    triton="fastkm.removal.triton",
    factored="state.cov",
    removes=True,
)
REPLACE_PATTERNS = Operation(
    "replace_patterns",
    arguments.State("state"),
    arguments.Codes("old_weights", "BTK"),
    arguments.Codes("old_values", "BTC"),
    arguments.Codes("weights", "BTK"),
    arguments.Codes("values", "BTC"),
    arguments.PatternVariance("noise_var"),
    arguments.PatternVariance("old_noise_var"),
    arguments.Mask("mask", "BT"),
    reference=reference.replace_block,
    native=native.replace_patterns,
    triton="fastkm.removal.triton",
    factored="state.cov",
    removes=True,
)


def remove_patterns(
    state: MemoryState,
    weights: Tensor,  # [B, T, K]
    values: Tensor,  # [B, T, C]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, T]
    *,
    mask: Tensor | None = None,  # [B, T], bool
    backend: str | None = None,
) -> MemoryState:
    """The memory as if these patterns had never been written: the exact inverse of :func:`update_posterior`.

    One pattern ``z`` that was written with weights ``w`` and noise ``σ²`` leaves the memory by::

        a = U w    s = σ² − wᵀa    δ = z − Rᵀw    R' = R − a δᵀ / s    U' = U + a aᵀ / s

    ``T`` patterns at once, in any order, whenever they were written::

        V = W U    diag σ² − V Wᵀ = L Lᵀ    G = L⁻¹ V    E = L⁻¹ (Z − W R)    R' = R − GᵀE    U' = U + GᵀG

    Args:
        state: a memory that these patterns are in; ``cov`` must be symmetric positive definite.
        weights: the weights with which the patterns were written. :func:`write` returns them.
        values: the patterns, as they were written.
        noise_var: the variance σ² with which they were written; one for all, one a memory, or one a pattern.
        mask: where False the pattern is not removed.
        backend: ``"reference"``, ``"native"``, ``"triton"``, or None for the first that can run the call.

    Returns:
        :class:`fastkm.MemoryState`.

    What was not in there: ``s`` is positive if and only if the covariance holds the pattern. If not, the call raises
    and names the memories; it returns no memory of the batch, and ``state`` stays as it was. Mask the patterns of the
    memories that it names, and call again. A pattern whose *values* differ from those written cannot be told: it is
    subtracted all the same.

    Numerics: float32 or float64, computed in that dtype; beside a float32 memory ``weights`` and ``values`` may be
    bfloat16 or float16. ``s`` is a difference, of which a write with ``x = wᵀUw / σ²`` (before it) leaves ``1/(1 + x)``
    of σ². A removal for which rounding leaves ``s`` less than two digits is refused: in float32 from an ``x`` of about
    180 on, in float64 of four million. Keep a memory from which patterns of small noise are removed in float64, or in
    the information form. Where a float32 memory would lose digits, the CPU kernels compute it again in float64.
    The gradient for ``state.cov`` is that of a symmetric matrix. Second derivatives are those of the reference form.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: what is removed was not all in there, or too few digits say so; ``cov`` is not
            symmetric or not positive definite, or an argument is not finite. Names the memories.
        fastkm.BackendUnavailableError: the named backend cannot run this call.
    """
    mean, cov, _ = call(REMOVE_PATTERNS, backend, state, weights, values, noise_var, mask)
    return make_result(MemoryState, (mean, cov))


def replace_patterns(
    state: MemoryState,
    old_weights: Tensor,  # [B, T, K]
    old_values: Tensor,  # [B, T, C]
    weights: Tensor,  # [B, T, K]
    values: Tensor,  # [B, T, C]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, T]
    *,
    old_noise_var: float | Tensor | None = None,  # float, 0-d, [B] or [B, T]
    mask: Tensor | None = None,  # [B, T], bool
    backend: str | None = None,
) -> MemoryState:
    """The memory as if the new patterns had been written in the place of the old: removal and update in one pass.

    It equals :func:`remove_patterns` of the old patterns after :func:`update_posterior` with the new ones. Both are one
    change of low rank: on a CPU the memory is read once and written once for each chunk of pairs. On a GPU the kernels
    of an update and of a removal run one after the other.

    Args:
        state: a memory that the old patterns are in; ``cov`` must be symmetric positive definite.
        old_weights, old_values: the patterns that leave, as they were written.
        weights, values: the patterns that come, as many as leave.
        noise_var: the variance σ² of the new patterns; one for all, one a memory, or one a pattern.
        old_noise_var: that with which the old ones were written; None if it is the same.
        mask: where False, neither is the old pattern removed nor the new one written.
        backend: ``"reference"``, ``"native"``, ``"triton"``, or None for the first that can run the call.

    Returns:
        :class:`fastkm.MemoryState`.

    Numerics, and what is refused: as for :func:`remove_patterns` and :func:`update_posterior`. New patterns come in
    before old ones leave, so where a new pattern has the weights of an old one, at least half of ``σ²`` is left to
    divide by, and the new covariance has the digits that the old one had. The mean moves by
    ``U w (z' − z)ᵀ / σ²``, which multiplies the rounding of ``cov``: its relative error is about ``ε (1 + x)``.

    Raises: as :func:`remove_patterns`.
    """
    if old_noise_var is None:
        old_noise_var = noise_var
    weights, values = _another(weights, old_weights), _another(values, old_values)
    old_noise_var = _another(old_noise_var, noise_var)
    mean, cov, _ = call(
        REPLACE_PATTERNS, backend, state, old_weights, old_values, weights, values, noise_var, old_noise_var, mask
    )
    return make_result(MemoryState, (mean, cov))


def _another(x: Any, other: Any) -> Any:
    """A view of ``x`` if it is ``other``: torch.compile takes no tensor twice as an argument with a gradient."""
    return x.view_as(x) if x is other and isinstance(x, Tensor) else x
