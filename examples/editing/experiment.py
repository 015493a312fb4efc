"""Edits in batches of 100, what they leave alone, and their removal."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastkm
from examples.editing import editing
from examples.editing.editing import Edits
from examples.editing.transformer import EDITED_WITH, PHRASES, Facts, Transformer, draw_facts, share_right, train

BATCH = 100
IDENTITY, ANCHOR = 0.1, 1.0  # λ² and μ²
FROZEN = "all edits, one covariance"
SAME, OTHER, ALL = range(EDITED_WITH), range(EDITED_WITH, PHRASES), range(PHRASES)


class Row(NamedTuple):
    edited: int
    same: float  # share of the edited facts with the new answer, in the phrases they were edited with
    other: float  # in other phrases
    oldest: float  # the first batch alone, in all phrases
    kept: float  # share of the facts never edited with the answer of the table
    drift: float  # change of the layer's outputs for facts never edited, root mean square, of the outputs' own


class Found(NamedTuple):
    trained: float  # share of the facts that the model answers before any edit
    exact: list[Row]
    frozen: list[Row]  # the covariance of the beginning for every batch
    gaps: dict[str, float]  # of the layer from the formula in float64, in parts of its largest entry
    condition: float  # of C_0
    half: Row  # after the first half was removed: the edits that stay, and facts never edited
    restored: float  # share of the facts whose edit was removed with the answer of the table
    seconds: dict[str, float]  # CPU time of a batch


def main(K: int = 2_048, facts: int = 4_000, edits: int = 2_000, steps: int = 300) -> Found:
    """Train, edit the first ``edits`` facts, and remove the first half of the edits, then all."""
    table = draw_facts(facts)
    model = train(table, K, steps)
    trained, original = share_right(model, table, ALL), model.edited.down.clone()
    precision = editing.anchor(model, table, IDENTITY, ANCHOR)
    new, kept = editing.draw_edits(table[:edits]), table[edits:]

    state = editing.layer_state(model, precision)
    frozen, made = edit_all(model, new, kept, lambda batch: write_frozen(state, batch))
    gaps = {FROZEN: editing.gap(state.mean[0], editing.formula(precision, original, made))}
    state.mean.copy_(original)
    exact, made = edit_all(model, new, kept, lambda batch: editing.write(state, batch))
    gaps["all edits"] = editing.gap(state.mean[0], editing.formula(precision, original, made))

    half = edits // 2
    unedited = kept_outputs(model, kept, original)
    remove_all(state, made[:half])
    without = editing.formula(precision, original, made[half:])
    gaps["the first half removed"] = editing.gap(state.mean[0], without)
    after = look(model, new[half:], kept, unedited)
    restored = share_right(model, table[:half], ALL)
    seconds = cost(state, made[:BATCH], precision, original)
    remove_all(state, made[half:])
    gaps["all removed"] = editing.gap(state.mean[0], original)
    ends = torch.linalg.eigvalsh(precision)
    condition = (ends[-1] / ends[0]).item()
    return Found(trained, exact, frozen, gaps, condition, after, restored, seconds)


def edit_all(model: Transformer, new: Facts, kept: Facts, write: Callable[[Edits], object]) -> tuple[list[Row], Edits]:
    """Edit batch by batch; a row after the first, a quarter, a half and all of them, and the edits that were made."""
    unedited, made, rows = kept_outputs(model, kept, model.edited.down), [], []
    batches = len(new.objects) // BATCH
    for count in range(1, batches + 1):
        batch = editing.find_edits(model, new[(count - 1) * BATCH : count * BATCH])
        write(batch)
        made.append(batch)
        if count in (1, batches // 4, batches // 2, batches):
            rows.append(look(model, new[: count * BATCH], kept, unedited))
    return rows, Edits(*(torch.cat(x) for x in zip(*made, strict=True)))


def write_frozen(state: fastkm.MemoryState, batch: Edits) -> None:
    """The step of MEMIT with the same C_0 for every batch, as if there had been no edits before."""
    new = fastkm.update_posterior(state, batch.keys.unsqueeze(0), batch.values.unsqueeze(0), 1.0).state
    state.mean.copy_(new.mean)


def remove_all(state: fastkm.MemoryState, made: Edits) -> None:
    for start in range(0, len(made.keys), BATCH):
        editing.remove(state, made[start : start + BATCH])


def kept_outputs(model: Transformer, kept: Facts, down: Tensor) -> Tensor:
    return torch.stack([editing.keys_of(model, kept, phrase) for phrase in ALL]) @ down


def look(model: Transformer, edited: Facts, kept: Facts, unedited: Tensor) -> Row:
    change = kept_outputs(model, kept, model.edited.down) - unedited
    return Row(
        len(edited.objects),
        share_right(model, edited, SAME),
        share_right(model, edited, OTHER),
        share_right(model, edited[:BATCH], ALL),
        share_right(model, kept, ALL),
        (change.square().mean() / unedited.square().mean()).sqrt().item(),
    )


def cost(state: fastkm.MemoryState, batch: Edits, precision: Tensor, original: Tensor) -> dict[str, float]:
    """CPU seconds of an edit in place, of a removal, and of the formula, which is solved anew for every batch."""
    work = fastkm.MemoryState(*(x.clone() for x in state))
    forms = {
        "`update_posterior(out=)`": lambda: editing.write(work, batch),
        "`remove_patterns`": lambda: editing.remove(work, batch),
        "the formula, float64": lambda: editing.formula(precision, original, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(3):
        for name, form in forms.items():
            start = time.process_time()
            form()
            seconds[name].append(time.process_time() - start)
    return {name: min(found) for name, found in seconds.items()}
