"""Whether a kernel's result is as good as the literal float32 loop's, problem by problem."""

import re
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from fuzz import forms, truth
from fuzz.problems import DRAWS, Problems

TIMES, FLOOR = 4, 2
EPS = torch.finfo(torch.float32).eps
MOST = torch.finfo(torch.float32).max
LEAST = torch.finfo(torch.float32).tiny / EPS  # smaller numbers have fewer digits
RIGHT = 1e-3  # a loop that is no further off is said to be right
ALONE = 1e-4  # where the loop refuses, a result that is no further off is good

GOOD, GOOD_ALONE = "good", "good, where the loop refuses"
MISSED, NOT_FINITE = "MISSED", "NOT FINITE"
REFUSED_BOTH, REFUSED_WRONG = "refused, as by the loop", "refused, and the loop is wrong"
REFUSED_RIGHT, BEYOND = "refused, where the loop is right", "beyond float32"
OUTCOMES = (GOOD, GOOD_ALONE, BEYOND, REFUSED_BOTH, REFUSED_WRONG, REFUSED_RIGHT, NOT_FINITE, MISSED)
FAULTS = (NOT_FINITE, MISSED)


class Verdict(NamedTuple):
    """Of one problem."""

    problem: str
    outcome: str
    worst: float  # error over bound, of the worst field
    detail: str = ""


class Computed(NamedTuple):
    """Outputs, and gradients by ``to_…``, of one form. ``refused`` [B] says which memories have none."""

    tensors: dict[str, Tensor]
    refused: Tensor


def differentiate(outputs: dict[str, Tensor], leaves: dict[str, Tensor], cotangents: dict[str, Tensor]) -> dict:
    used = [name for name in cotangents if outputs[name].requires_grad]
    if not used:
        return {}
    gradients = torch.autograd.grad(
        [outputs[name] for name in used],
        list(leaves.values()),
        [cotangents[name].to(outputs[name].dtype) for name in used],
        allow_unused=True,
    )
    found = {
        f"to_{name}": torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(leaves.items(), gradients, strict=True)
    }
    if "to_cov" in found:
        found["to_cov"] = (found["to_cov"] + found["to_cov"].mT) / 2
    return found


def compute(form, problems: Problems, inputs: dict[str, Tensor], cotangents: dict[str, Tensor] | None) -> Computed:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    outputs, info = form(problems, leaves)
    gradients = differentiate(outputs, leaves, cotangents) if cotangents else {}
    return Computed({name: x.detach() for name, x in (outputs | gradients).items()}, info != 0)


def exact(problems: Problems, inputs: dict[str, Tensor]):
    outputs = truth.run(problems, inputs)
    return outputs, torch.zeros(len(inputs["mean"]), dtype=torch.int32)


def draw_cotangents(problems: Problems, outputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random ones in float32, of the size of one over the output; the same for neighbours."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + problems.number)
    made = {}
    for (name, x), wanted in zip(outputs.items(), problems.has_cotangent, strict=False):
        g = torch.randn(x[::DRAWS].shape, generator=generator, dtype=torch.float64)
        size = norms(x)[::DRAWS].clamp(1e-12, 1e12)
        g = g / size.view(-1, *[1] * (x.dim() - 1))
        g = (g + g.mT) / 2 if name == "cov" else g
        if wanted:
            made[name] = g.float().repeat_interleave(DRAWS, 0)
    return made


def norms(x: Tensor) -> Tensor:
    return x.double().reshape(len(x), -1).norm(dim=1)


def errors(got: Tensor, wanted: Tensor) -> Tensor:
    """‖got − wanted‖ / ‖wanted‖ of every memory."""
    return norms(got.double() - wanted) / norms(wanted).clamp_min(LEAST)


def grouped(x: Tensor) -> Tensor:
    return x.view(-1, DRAWS)


def own_errors(loop: Computed, right: Computed, again: Computed, inputs: dict[str, Tensor], name: str) -> Tensor:
    """[problems]: the yardstick. No error is known better than the truth, which is computed twice."""
    wanted = right.tensors[name]
    own = errors(loop.tensors[name], wanted)
    known = ~loop.refused & own.isfinite()
    own = grouped(torch.where(known, own, 0.0)).max(1).values
    first = wanted[::DRAWS].repeat_interleave(DRAWS, 0)
    spread = grouped(errors(wanted, first)).max(1).values
    doubt = grouped(errors(again.tensors[name], wanted)).max(1).values
    slack = grouped(largest_effect(right, inputs, name)).max(1).values
    own = torch.where(grouped(known).any(1), own, spread.maximum(ALONE / TIMES * slack))
    return own.maximum(doubt) + FLOOR * EPS * slack


def largest_effect(right: Computed, inputs: dict[str, Tensor], name: str) -> Tensor:
    """[B]: for a gradient, the largest ‖x‖ ‖to_x‖ of any input, over that of its own; 1 for an output.

    A gradient says how the loss follows its input. One whose ‖x‖ ‖to_x‖ is a rounding of another's says nothing.
    """
    if not name.startswith("to_"):
        return torch.ones(len(right.refused), dtype=torch.float64)
    effects = {x: norms(inputs[x]) * norms(right.tensors[f"to_{x}"]) for x in inputs}
    largest = torch.stack(list(effects.values())).amax(0)
    return largest / effects[name.removeprefix("to_")].clamp_min(LEAST)


# The axes of every tensor that go over the rows of a memory.
ROWS = {"mean": (1,), "cov": (1, 2), "weights": (2,)}


def reversed_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.flip(ROWS.get(name.removeprefix("to_"), ())) for name, x in tensors.items()}


def exact_in_reverse(problems: Problems, inputs: dict[str, Tensor]):
    """The truth with other roundings: the order of a memory's rows has no meaning."""
    outputs, info = exact(problems, reversed_rows(inputs))
    return reversed_rows(outputs), info


def judge(problems: Problems, seed: int, gradients: bool = True) -> list[Verdict]:
    wide = {name: x.double() for name, x in problems.inputs.items()}
    cotangents = None
    if gradients:
        cotangents = draw_cotangents(problems, {n: x.detach() for n, x in truth.run(problems, wide).items()}, seed)
    right = compute(exact, problems, wide, cotangents)
    again = compute(exact_in_reverse, problems, wide, cotangents)
    loop = compute(forms.literal, problems, problems.inputs, cotangents)
    found = compute(forms.kernel, problems, problems.inputs, cotangents)
    if found.refused.any():
        check_words(problems, found.refused)
    names = list(found.tensors)
    own = torch.stack([own_errors(loop, right, again, wide, name) for name in names], 1)  # [problems, names]
    error = torch.stack([grouped(errors(found.tensors[n], right.tensors[n])).amax(1) for n in names], 1)
    beyond = torch.stack(
        [grouped(right.tensors[n].abs().reshape(len(right.refused), -1).amax(1) > MOST / 4).any(1) for n in names], 1
    )
    return [
        verdict(f"{problems}[{i}]", names, own[i], error[i], beyond[i],
                grouped(found.refused)[i].any().item(), grouped(loop.refused)[i].any().item())
        for i in range(len(own))
    ]  # fmt: skip


def verdict(problem, names, own, error, beyond, refused: bool, loop_refused: bool) -> Verdict:
    if beyond.any():
        return Verdict(problem, BEYOND, 0)
    if refused:
        right = REFUSED_RIGHT if own.max() <= RIGHT else REFUSED_WRONG
        return Verdict(problem, REFUSED_BOTH if loop_refused else right, 0)
    ratio = error / (TIMES * own)
    at = ratio.nan_to_num(torch.inf).argmax().item()
    detail = f"{names[at]}: error {error[at]:.2g}, the loop's {own[at]:.2g}"
    if not error.isfinite().all():
        return Verdict(problem, NOT_FINITE, torch.inf, detail)
    if ratio[at] > 1:
        return Verdict(problem, MISSED, ratio[at].item(), detail)
    return Verdict(problem, GOOD_ALONE if loop_refused else GOOD, ratio[at].item())


def check_words(problems: Problems, refused: Tensor) -> None:
    """The public function names the memories that the kernel refused, and no others."""
    words = forms.words_of_refusal(problems)
    named = {int(n) for found in re.findall(r"memor(?:y|ies) \[([\d, ]+)\]", words) for n in found.split(",")}
    assert named == set(refused.nonzero().flatten().tolist()), f"{problems}: {words}"


def tally(verdicts: list[Verdict]) -> Counter:
    return Counter(v.outcome for v in verdicts)
