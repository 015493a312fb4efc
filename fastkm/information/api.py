"""The information form of a memory: patterns are added and subtracted, and memories are merged."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkm._linalg.reference import symmetry
from fastkm._runtime import guards
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.deferred import assert_later, is_value_unknown, known
from fastkm._runtime.status import in_memories, raise_failures
from fastkm.information import reference
from fastkm.state import InformationState, MemoryState, check_form

__all__ = ["from_information", "merge_memories", "to_information", "update_information"]


@in_float32
def to_information(state: MemoryState) -> InformationState:
    """The information form of a memory, in float64: ``Λ = U⁻¹``, ``η = U⁻¹ R``.

    It is always float64, because a memory holds directions that no pattern has reached beside directions that many
    have: the sums of float32 lose the digits of the first, by a factor of about ``wᵀ U w / σ²``.

    Args:
        state: mean ``[B, K, C]`` and cov ``[B, K, K]``, symmetric positive definite; float32 or float64.

    Returns:
        :class:`fastkm.InformationState`, float64. Gradients flow through.

    Raises:
        TypeError, ValueError: ``state`` is of the wrong kind, dtype, shape or device.
        torch.linalg.LinAlgError: ``cov`` is not symmetric positive definite, or ``mean`` is not finite; names the
            memories.
    """
    mean, cov = guards.Signature().state("state", state)
    _refuse_broken("state.mean is not finite", mean)
    raise_failures(symmetry(cov), "state.cov")
    precision, information, info = reference.to_information(mean.double(), cov.double())
    raise_failures(info, "state.cov")
    return InformationState(precision, information)


@in_float32
def from_information(
    information_state: InformationState,
    *,
    dtype: torch.dtype | None = None,
) -> MemoryState:
    """The memory of an information form: ``U = Λ⁻¹``, ``R = Λ⁻¹ η``, by one Cholesky factor a memory.

    Args:
        information_state: precision ``[B, K, K]``, symmetric positive definite, and information ``[B, K, C]``.
        dtype: of the memory, float32 or float64. None keeps that of ``information_state``. The inverse is computed in
            float64 and rounded.

    Returns:
        :class:`fastkm.MemoryState`. Gradients flow through.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
        torch.linalg.LinAlgError: ``precision`` is not symmetric positive definite: more was subtracted than was in
            there. Or ``information`` is not finite, or ``dtype`` does not hold the memory. Names the memories.
    """
    precision, information = check_form("information_state", information_state, InformationState)
    if dtype is None:
        dtype = precision.dtype
    elif dtype not in guards.DTYPES:
        raise TypeError(f"dtype must be torch.float32, torch.float64 or None, got {dtype}")
    _refuse_broken("information_state.information is not finite", information)
    raise_failures(symmetry(precision), "information_state.precision")
    mean, cov, info = reference.from_information(precision.double(), information.double())
    raise_failures(info, "information_state.precision")
    return _rounded(mean, cov, dtype)


@in_float32
def update_information(
    information_state: InformationState,
    weights: Tensor,  # [B, T, K]
    values: Tensor,  # [B, T, C]
    noise_var: float | Tensor,  # float, 0-d, [B] or [B, T]
    *,
    mask: Tensor | None = None,  # [B, T], bool
) -> InformationState:
    """Add patterns: ``Λ' = Λ + Wᵀ diag(σ²)⁻¹ W``, ``η' = η + Wᵀ diag(σ²)⁻¹ Z``. The same memory as an update gives.

    Sums commute, so patterns may come in any order, and from any number of places.

    Args:
        information_state: what is added to, float64 as :func:`to_information` gives it, or float32.
        weights: how much each row of the memory takes part in each pattern.
        values: the patterns. Each of ``weights`` and ``values`` may also be float32, bfloat16 or float16 beside a
            float64 state, bfloat16 or float16 beside a float32 one.
        noise_var: variance σ² of the observation noise, positive; one for all, one a memory, or one a pattern. It has
            the dtype of the state, or float32 beside a float64 state.
        mask: where False the pattern changes nothing.

    Returns:
        :class:`fastkm.InformationState`, in the dtype of ``information_state``. Products and sums are float64; a
        float32 state is rounded once. Gradients flow through.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: the sums are not finite: an argument is not, or they leave the range of their dtype.
            Names the memories.

    Source: math of the Kalman filter in information form; Anderson and Moore, "Optimal Filtering", 1979, §6.3.
    """
    precision, information = check_form("information_state", information_state, InformationState)
    signature = guards.Signature()
    B, K, C = information.shape
    signature.sizes.update(B=B, K=K, C=C)
    signature.first = ("information_state.precision", precision)
    weights = signature.tensor("weights", _widened(weights, precision), "BTK", low_precision=True)
    values = signature.tensor("values", _widened(values, precision), "BTC", low_precision=True)
    noise = signature.noise("noise_var", _widened(noise_var, precision, (torch.float32,)))
    mask = signature.mask("mask", mask, "BT")
    precision64, information64, weights, values, noise = (
        x.double() for x in (precision, information, weights, values, noise)
    )
    new = reference.update_information(precision64, information64, weights, values, noise, mask)
    new = InformationState(*(x.to(precision.dtype) for x in new))
    _refuse_broken("the new information form is not finite", *new)
    return new


@in_float32
def merge_memories(states: Sequence[MemoryState], prior: MemoryState) -> MemoryState:
    """The memory that has seen all that ``states`` have seen, each written from ``prior`` on data of its own.

    With ``Λ = U⁻¹`` and ``η = U⁻¹ R``, what the memories have learnt adds up::

        Λ = Σ_i Λ_i − (n − 1) Λ_0        η = Σ_i η_i − (n − 1) η_0

    Computed in float64 and rounded to the dtype of the memories. Patterns that several memories have seen count as
    often as they were seen.

    Args:
        states: at least one memory; all of one shape, dtype and device.
        prior: the memory that each was written from.

    Returns:
        :class:`fastkm.MemoryState`. Gradients flow through.

    Raises:
        TypeError, ValueError: a memory of the wrong kind, dtype, shape or device; names it. Also a memory that cannot
            come from ``prior``: it knows less than ``prior`` along some direction, or its mean differs from the
            prior's along a direction that it has learnt nothing of. A prior that differs along directions that were
            all written to cannot be told, nor what rounding hides: a variance that is larger by a share of
            ``32 K ε max(diag U_0) ‖U_0⁻¹‖₂``, and in float32 a mean.
        torch.linalg.LinAlgError: a covariance is not symmetric positive definite, a mean is not finite, or the dtype
            does not hold the merged memory; names the memories.
    """
    if isinstance(states, MemoryState) or not isinstance(states, (tuple, list)):
        raise TypeError(f"states must be a list of MemoryState, got {type(states).__name__}")
    if not states:
        raise ValueError("states must hold at least one memory, it is empty")
    forms, dtype = forms_of(states, prior)
    return merged(reference.merge(forms[1:], forms[0]), dtype)


def forms_of(states: Sequence[MemoryState], prior: MemoryState) -> tuple[list[list[Tensor]], torch.dtype]:
    """The information forms of ``prior`` and of each of ``states``, in float64, and the dtype of the memories.

    Refuses, by name, a memory that was not written from ``prior``.
    """
    signature = guards.Signature()
    pairs = [signature.state("prior", prior)]
    pairs += [signature.state(f"states[{i}]", state) for i, state in enumerate(states)]
    names = ["prior", *(f"states[{i}]" for i in range(len(states)))]
    forms = []
    for name, (mean, cov) in zip(names, pairs, strict=True):
        _refuse_broken(f"{name}.mean is not finite", mean)
        raise_failures(symmetry(cov), f"{name}.cov")
        *form, info = reference.to_information(mean.double(), cov.double())
        raise_failures(info, f"{name}.cov")
        forms.append(form)
    _refuse_other_priors(pairs)
    return forms, pairs[0][0].dtype


def merged(form: tuple[Tensor, Tensor], dtype: torch.dtype) -> MemoryState:
    """The memory of a merged information form."""
    mean, cov, info = reference.from_information(*form)
    raise_failures(info, "the merged precision")
    return _rounded(mean, cov, dtype)


def _widened(value: object, state: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, *guards.LOW_PRECISION)):
    """What a caller gives, in float64 where it has one of ``dtypes`` and the state is float64."""
    if isinstance(value, Tensor) and state.dtype == torch.float64 and value.dtype in dtypes:
        return value.double()
    return value


def _rounded(mean: Tensor, cov: Tensor, dtype: torch.dtype) -> MemoryState:
    state = MemoryState(mean.to(dtype), cov.to(dtype))
    _refuse_broken(f"the memory is beyond the range of {guards.dtype_name(dtype)}", *state)
    return state


def _refuse_other_priors(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Refuse, by name, a memory that cannot have been written from the first of ``pairs``, which is the prior."""
    (prior_mean, prior_cov), *written = ([x.detach() for x in pair] for pair in pairs)
    for i, (mean, cov) in enumerate(written):
        knows_less, moved = reference.differs_from_prior(mean, cov, prior_mean, prior_cov)
        start = f"states[{i}] was not written from prior: "
        _refuse(knows_less, f"{start}it is less certain than prior along some direction,", ValueError)
        _refuse(moved, f"{start}its mean differs from that of prior where it has learnt nothing,", ValueError)


def _refuse_broken(words: str, *tensors: Tensor) -> None:
    """Raise ``words`` for the memories where one of ``tensors`` has an entry that is not finite."""
    if not is_value_unknown(tensors[0]) and all([math.isfinite(known(x).sum()) for x in tensors]):
        return  # as nearly always, and soon known
    finite = [x.detach().isfinite().flatten(1).all(-1) for x in tensors]
    _refuse(~torch.stack(finite).all(0), words)


def _refuse(failed: Tensor, words: str, kind: type[Exception] = torch.linalg.LinAlgError) -> None:
    """Raise ``words`` for the memories [B] that failed. In a graph it becomes an assertion of the graph."""
    if is_value_unknown(failed):
        assert_later(~failed.any(), words.rstrip(","))
        return
    memories = known(failed).nonzero().squeeze(-1).tolist()
    if memories:
        raise kind(words + in_memories(memories))
