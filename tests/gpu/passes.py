"""The modules that Triton's compiler makes of a kernel, pass by pass, executed by ttsem on the inputs of a launch.

The frontend makes TTIR of a kernel. The compiler makes TTGIR of that for a target, which says what each thread holds.
Both are executed on what the tensors of a launch held before it, and must leave the same bits in them.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from ttsem import harness, mlir, validate

TARGETS = {"sm_80": 80, "sm_90": 90}
LOCATION = re.compile(r" loc\(.*\)$", re.MULTILINE)


class Verdict(NamedTuple):
    kernel: str
    outcome: str  # "match": the same bits; "approx": within ttsem's tolerance for products; else the difference


class Recorder:
    """Replaces ttsem's executor: keeps one launch of every kernel, and its tensors after TTIR was executed."""

    def __init__(self) -> None:
        self.launches: dict[str, harness.LaunchRecord] = {}
        self._execute = harness.execute

    def __call__(self, record, text, *arguments, **options):
        execution = self._execute(record, text, *arguments, **options)
        known = text in self.launches or any(record is judged for judged in self.launches.values())
        if not known and execution.failure is None:
            record.post = {name: np.array(execution.buffer(record, name)) for name in record.ptrs}
            self.launches[text] = record
        return execution


def judge(record) -> list[Verdict]:
    """Execute the TTGIR of a kernel for each target; once if it is the same for all."""
    outcomes: dict[str, str] = {}
    for compute_capability in TARGETS.values():
        text = harness._stage_text(record, "ttgir", harness.target_for("cpu", compute_capability))
        text = without_locations(text).replace(f"cuda:{compute_capability}", "cuda")
        if text not in outcomes:
            found = harness.run_launch(record, text)
            said = "" if found.verdict in ("match", "approx") else f" {found.message or found.diffs}"
            outcomes[text] = found.verdict + said
    return [Verdict(record.fn_name, outcome) for outcome in outcomes.values()]


def every_stage(record, target: str) -> list[tuple[str, str]]:
    """Every module between two passes that differs from the one before; printing them takes minutes for a kernel."""
    with _printed() as dump:
        harness._stage_text(record, "ttgir", harness.target_for("cpu", TARGETS[target]))
    stages: list[tuple[str, str]] = []
    for name, text in validate.split_dump(dump[0]):
        text = without_locations(text)
        if not stages or stages[-1][1] != text:
            stages.append((name, text))
    return stages


def without_locations(text: str) -> str:
    """Locations in the source are half of the text and change no result."""
    return LOCATION.sub("", text)


@contextmanager
def _printed() -> Iterator[list[str]]:
    """What the compiler prints before every pass."""
    mlir.enable_generic_printing()
    sys.stderr.flush()
    terminal, printed = os.dup(2), []
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        os.environ["MLIR_ENABLE_DUMP"] = "1"
        try:
            yield printed
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            del os.environ["MLIR_ENABLE_DUMP"]
            file.seek(0)
            printed.append(file.read().decode())
