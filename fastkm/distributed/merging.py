"""Merging memories that the ranks of a group have written from one prior."""

from collections.abc import Sequence

from fastkm._runtime.autocast import in_float32
from fastkm.distributed.ranks import Group, Ranks, Share
from fastkm.distributed.shares import GRADIENT
from fastkm.information.api import forms_of, merged
from fastkm.state import MemoryState

__all__ = ["merge_memories"]


@in_float32
def merge_memories(
    states: MemoryState | Sequence[MemoryState], prior: MemoryState, *, group: Group = None
) -> MemoryState:
    """:func:`fastkm.merge_memories` of what all ranks have written from one prior, each on data of its own.

    What the memories have learnt adds up, so that one all-reduce of ``K² + KC`` float64 numbers a memory is enough::

        Λ = Λ_0 + Σ_ranks Σ_i (Λ_i − Λ_0)        η = η_0 + Σ_ranks Σ_i (η_i − η_0)

    Args:
        states: the memory of this rank, or a list of any number of them, none included. mean ``[B, K, C]``, whole.
        prior: the memory that each was written from, the same on every rank.
        group: as in :func:`write_sharded`.

    Returns:
        the merged memory, the same on every rank. If no rank has a memory, it is ``prior`` to rounding.

    Gradients and errors: as :func:`write_sharded`, and what :func:`fastkm.merge_memories` refuses. All ranks must want
    a gradient or none.
    """
    ranks = Ranks("merge_memories", group)

    def share() -> Share:
        own = [states] if isinstance(states, MemoryState) else states
        if not isinstance(own, (tuple, list)):
            raise TypeError(f"states must be a MemoryState or a list of them, got {type(own).__name__}")
        (first, *forms), dtype = forms_of(own, prior)
        learnt = [sum((form[part] - first[part] for form in forms), 0 * first[part]) for part in (0, 1)]
        mean, cov = prior
        facts = {"B": mean.shape[0], "K": mean.shape[1], "C": mean.shape[2], "prior.mean": mean, "prior.cov": cov}
        facts[GRADIENT] = any(x.requires_grad for x in learnt)
        return Share(facts, dtype, mean.shape[2], (first, learnt, dtype))

    first, learnt, dtype = ranks.attempt(share)
    precision, information = ranks.sum(*learnt)
    return merged((first[0] + precision, first[1] + information), dtype)
