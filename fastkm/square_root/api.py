"""The square-root form of a memory, which holds its digits however small the noise is."""

from torch import Tensor

from fastkm._linalg.reference import symmetry
from fastkm._runtime import arguments, guards
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.call import call, make_result
from fastkm._runtime.operation import Operation
from fastkm._runtime.status import raise_failures
from fastkm.square_root import native, reference
from fastkm.state import MemoryState, SquareRootState, check_form

__all__ = ["from_square_root", "to_square_root", "update_square_root"]

UPDATE_SQUARE_ROOT = Operation(
    "update_square_root",
    arguments.Matrix("square_root_state.mean", "BKC"),
    arguments.Matrix("square_root_state.root", "BKK"),
    arguments.Codes("weights", "BTK"),
    arguments.Codes("values", "BTC"),
    arguments.PatternVariance("noise_var"),
    arguments.Mask("mask", "BT"),
    reference=reference.update_sequential,
    native=native.update_square_root,
    factored="square_root_state.root",
)


@in_float32
def to_square_root(state: MemoryState) -> SquareRootState:
    """The square-root form of a memory: the lower Cholesky factor of its covariance, ``U = S Sᵀ``.

    Args:
        state: mean ``[B, K, C]`` and cov ``[B, K, K]``, symmetric positive definite; float32 or float64.

    Returns:
        :class:`fastkm.SquareRootState`. Gradients flow through.

    Raises:
        TypeError, ValueError: ``state`` is of the wrong kind, dtype, shape or device.
        torch.linalg.LinAlgError: ``cov`` is not symmetric positive definite; names the memories.
    """
    mean, cov = guards.Signature().state("state", state)
    raise_failures(symmetry(cov), "state.cov")
    root, info = reference.to_root(cov)
    raise_failures(info, "state.cov")
    return SquareRootState(mean, root)


@in_float32
def from_square_root(square_root_state: SquareRootState) -> MemoryState:
    """The memory of a square-root form: ``U = S Sᵀ``, rounded to its dtype once.

    A covariance in float32 holds variances down to about ``1e-7`` of its largest one. Below, ``cov`` may be indefinite
    by rounding, though ``root`` is good; go on with the square-root form then.

    Raises:
        TypeError, ValueError: ``square_root_state`` is of the wrong kind, dtype, shape or device.
    """
    mean, root = check_form("square_root_state", square_root_state, SquareRootState)
    cov = root @ root.mT
    return MemoryState(mean, (cov + cov.mT) / 2)


def update_square_root(
    square_root_state: SquareRootState,
    weights: Tensor,  # [B, T, K]
    values: Tensor,  # [B, T, C]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, T]
    *,
    mask: Tensor | None = None,  # [B, T], bool
    backend: str | None = None,
) -> SquareRootState:
    """Condition the memory on patterns, as :func:`update_posterior` does, without ever forming its covariance.

    One pattern ``z`` with weights ``w`` changes the root ``S`` of ``U = S Sᵀ`` by an orthogonal reflection (Potter)::

        p = Sᵀ w    s = pᵀp + σ²    R' = R + S p (z − Rᵀw)ᵀ / s    S' = S − S p pᵀ / (√s (√s + σ))

    The kernels apply the ``T`` reflections of a chunk at once, which is the QR factorisation
    ``[[diag σ, 0], [(W S)ᵀ, Sᵀ]] = Q [[Lᵀ, G], [0, S'ᵀ]]`` by Householder's reflections, and then
    ``R' = R + Gᵀ L⁻¹ (Z − W R)``. The root that comes out is not triangular.

    Args:
        square_root_state: the memory before; ``root`` may be any finite matrix.
        weights: how much each row of the memory takes part in each pattern.
        values: the patterns.
        noise_var: variance σ² of the observation noise, positive; one for all, one a memory, or one a pattern.
        mask: where False the pattern changes nothing.
        backend: ``"reference"``, ``"native"``, or None for the first that can run the call.

    Returns:
        :class:`fastkm.SquareRootState`.

    Numerics: float32 or float64, computed in that dtype; beside a float32 memory ``weights`` and ``values`` may be
    bfloat16 or float16. Nothing is subtracted that could become negative, so no noise is too small; ``S' S'ᵀ`` is a
    covariance whatever the rounding was. Reflections keep lengths: the error of ``S`` is that of rounding it once a
    chunk.
    Second derivatives are those of the reference form, at its cost.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: an argument is not finite; names the memories.
        fastkm.BackendUnavailableError: the named backend cannot run this call.

    Source: Potter, "New statistical formulas", MIT 1963; Kaminski, Bryson and Schmidt, "Discrete square root
    filtering", IEEE Transactions on Automatic Control, 1971.
    """
    if type(square_root_state) is not SquareRootState:
        guards.pair("square_root_state", square_root_state, "SquareRootState(mean, root)")
    mean, root, _ = call(UPDATE_SQUARE_ROOT, backend, *square_root_state, weights, values, noise_var, mask)
    return make_result(SquareRootState, (mean, root))
