"""The status that a kernel reports for each memory, and the error it becomes.

Every kernel that factors a matrix returns ``info [B]``, an int32 tensor, as its last output: 0 for a memory that went
well, or one of the codes below. The whole batch is computed before an error is raised; the error names every memory
that failed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastkm._runtime.deferred import assert_later, is_value_unknown

# LOST: the matrices were good, and the covariance that follows from them has lost its digits to rounding.
# OUT_OF_RANGE: likewise, and it is larger than its dtype holds.
# NOT_WRITTEN: what is removed was not all in there. UNTOLD: whether it was is lost to rounding.
ASYMMETRIC, NOT_POSITIVE_DEFINITE, LOST, OUT_OF_RANGE, NOT_WRITTEN, UNTOLD = 1, 2, 3, 4, 5, 6
WORDS = {
    ASYMMETRIC: "not symmetric",
    NOT_POSITIVE_DEFINITE: "not positive definite",
    LOST: "lost to rounding",
    OUT_OF_RANGE: "beyond the range of its dtype",
    NOT_WRITTEN: "not all in there",
    UNTOLD: "lost in the rounding of the memory",
}


def in_memories(failed: list) -> str:
    """Where, given the indices of memories. Under vmap a memory is a pair: [index of the map, memory]."""
    return f" in {'memory' if len(failed) == 1 else 'memories'} {failed}"


def raise_failures(info: Tensor, matrix: str, place: Callable[[list], str] = in_memories) -> None:
    """Raise for the memories of ``info`` that failed to factor ``matrix``, or do nothing.

    In a graph that is traced or captured the check becomes an assertion of the graph, which raises RuntimeError.
    """
    if is_value_unknown(info):
        assert_later(~info.any(), f"{matrix} is not symmetric positive definite")
        return
    info = torch.func.debug_unwrap(info)
    if any(info.flatten().tolist()):
        raise factorisation_error(info, matrix, place)


def factorisation_error(
    info: Tensor, matrix: str, place: Callable[[list], str] = in_memories
) -> torch.linalg.LinAlgError:
    """The error that names every memory of ``info`` that failed to factor ``matrix``."""
    return torch.linalg.LinAlgError(f"{matrix} is {describe_failures(info, place)}")


def describe_failures(info: Tensor, place: Callable[[list], str]) -> str:
    """Every reason in ``info`` in words. ``place`` says where, given the indices that share a reason."""
    reasons = []
    for code, words in WORDS.items():
        failed = (info == code).nonzero().squeeze(-1).tolist()
        if failed:
            reasons.append(words + place(failed))
    return " and ".join(reasons)
