"""Why a call failed, in words.

A kernel knows which factorisation failed, not why: a NaN in the patterns, a ridge that is too small and a covariance
that is none look alike. So the error looks at the arguments again, which costs a factorisation where a call fails.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastkm._runtime.deferred import assert_later, is_value_unknown, known
from fastkm._runtime.status import (
    ASYMMETRIC,
    LOST,
    NOT_POSITIVE_DEFINITE,
    NOT_WRITTEN,
    OUT_OF_RANGE,
    UNTOLD,
    WORDS,
    describe_failures,
    in_memories,
)

if TYPE_CHECKING:
    from fastkm._runtime.operation import Operation

WORST_FIRST = ("not finite", *WORDS.values())

# A negative eigenvalue is rounding's if it is no larger than this many roundings of the largest eigenvalue.
ROUNDINGS = 256

NEW, REMOVED = "the new covariance", "what is removed"
SUBJECTS = {LOST: NEW, OUT_OF_RANGE: NEW, NOT_WRITTEN: REMOVED, UNTOLD: REMOVED}  # of the others: what is factored


class Finding(NamedTuple):
    """What is wrong with a memory: ``subject`` is ``words``; ``advice`` may be empty."""

    subject: str
    words: str
    advice: str = ""


def raise_failures(info: Tensor, operation: "Operation", inputs: list) -> None:
    """Raise for the memories of ``info`` that failed, or do nothing.

    In a graph that is traced or captured the check becomes an assertion of the graph, which raises RuntimeError.
    """
    if is_value_unknown(info):
        doubt = f", or {REMOVED} is not all in there" if operation.removes else ""
        assert_later(~info.any(), f"{operation.factored} is not symmetric positive definite{doubt}")
        return
    info = known(info)
    if any(info.flatten().tolist()):
        raise factorisation_error(info, operation, inputs)


def factorisation_error(info: Tensor, operation: "Operation", inputs: list) -> torch.linalg.LinAlgError:
    """The error that says of every memory of ``info`` that failed which of the ``inputs`` is at fault."""
    if info.dim() != 1:  # under vmap a memory is a pair, [index of the map, memory], and inputs need not have the first
        return torch.linalg.LinAlgError(_by_code(info, operation.factored))
    given = dict(zip(operation.input_names(), inputs, strict=False))  # trailing inputs may be left out
    findings: dict[Finding, list[int]] = {}
    for memory, code in enumerate(info.tolist()):
        if code:
            findings.setdefault(diagnose(memory, code, operation.factored, given), []).append(memory)
    subjects: dict[str, list[str]] = {}
    for finding, memories in sorted(findings.items(), key=lambda item: WORST_FIRST.index(item[0].words)):
        subjects.setdefault(finding.subject, []).append(finding.words + in_memories(memories))
    message = "; ".join(f"{subject} is {' and '.join(words)}" for subject, words in subjects.items())
    advice = dict.fromkeys(finding.advice for finding in findings if finding.advice)
    return torch.linalg.LinAlgError(": ".join((message, *advice)))


def _by_code(info: Tensor, factored: str) -> str:
    """What failed, as far as the codes alone tell."""
    parts = []
    for subject in (factored, NEW, REMOVED):
        codes = [code for code in WORDS if SUBJECTS.get(code, factored) == subject]
        failed = torch.where(torch.isin(info, torch.tensor(codes).to(info)), info, 0)
        if failed.any():
            parts.append(f"{subject} is {describe_failures(failed, in_memories)}")
    return "; ".join(parts)


def diagnose(memory: int, code: int, factored: str, given: dict[str, object]) -> Finding:
    """Which of the ``given`` inputs is at fault where ``memory`` has the status ``code``."""
    tensors = dict(_of_memory(memory, given))
    for name, x in tensors.items():
        if not x.isfinite().all():
            return Finding(name, WORST_FIRST[0])
    dtype = next(iter(tensors.values())).dtype
    use = "use float64, or" if dtype != torch.float64 else "use"
    covariances = {name: x for name, x in tensors.items() if name.endswith("cov")}
    if code == ASYMMETRIC:
        tolerance = torch.finfo(dtype).eps ** 0.5
        crooked = (name for name, x in covariances.items() if (x - x.mT).abs().max() > tolerance * x.abs().max())
        return Finding(next(crooked, factored), WORDS[code])
    if code == OUT_OF_RANGE:
        advice = "forgetting lets it grow wherever no weights reach; use forgetting nearer to 1, or retention"
        return Finding(NEW, WORDS[code], advice)
    for name, x in covariances.items():
        if torch.linalg.cholesky_ex(x.double()).info:
            values = torch.linalg.eigvalsh(x.double())
            by_rounding = -values[0] <= ROUNDINGS * torch.finfo(dtype).eps * values[-1]
            advice = f"it is so by rounding; {use} more noise or fewer updates" if by_rounding else ""
            return Finding(name, WORDS[NOT_POSITIVE_DEFINITE], advice)
    if code == NOT_WRITTEN:
        return Finding(REMOVED, WORDS[code], "remove what was written, with the same weights and noise")
    if code == UNTOLD:
        return Finding(REMOVED, WORDS[code], f"{use} more noise when writing")
    if (
        code == NOT_POSITIVE_DEFINITE
        and "ridge" in tensors
        and not (factored == "state.cov" and _ridge_counts(tensors))
    ):
        return Finding("mean meanᵀ + ridge I", WORDS[code], f"{use} a larger ridge")
    if factored.endswith(".root"):  # no noise is too small for it
        return Finding("the new memory", WORDS[OUT_OF_RANGE])
    if "noise_var" in tensors:
        short = f"{str(dtype).removeprefix('torch.')} does not hold what the noise leaves of it along a pattern"
        return Finding(NEW, WORDS[LOST], f"{short}; {use} more noise")
    return Finding(factored, WORDS[code])


def _of_memory(memory: int, given: dict[str, object]) -> Iterable[tuple[str, Tensor]]:
    """The numbers of one memory, without those of its masked patterns."""
    mask = given.get("mask")
    for name, x in given.items():
        if not isinstance(x, Tensor) or x.dtype == torch.bool:
            continue
        x = torch.func.debug_unwrap(x).detach()
        x = x[memory] if x.dim() else x
        if isinstance(mask, Tensor) and name.endswith(("weights", "values")):
            x = x[torch.func.debug_unwrap(mask)[memory]]
        yield name, x


def _ridge_counts(tensors: dict[str, Tensor]) -> bool:
    """Whether the ridge is more than rounding beside ``mean meanᵀ``: a write fails for its noise too."""
    mean, ridge = (tensors[name].double() for name in ("state.mean", "ridge"))
    energies = mean.square().sum(-1)
    return bool(ridge > len(energies) * torch.finfo(tensors["state.mean"].dtype).eps * energies.max())
