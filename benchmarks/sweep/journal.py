"""Where measured cells are kept, one line of JSON each, so that a run that was stopped goes on where it was.

A record counts for the code and the machine that it was measured with, and for no other.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import benchmarks
import fastkm
from benchmarks.sweep.grid import Cell
from fastkm.cli.machine import instruction_level, processor

Record = dict[str, Any]
MEASURED_BY = ("ceiling.py", "forms.py", "timing.py", "sweep/grid.py", "sweep/measure.py")  # of benchmarks/


def digest_of_code() -> str:
    """Of the package, its compiled kernels, and what measures it."""
    package, measuring = Path(fastkm.__file__).parent, Path(benchmarks.__file__).parent
    files = sorted(file for pattern in ("*.py", "*.so") for file in package.rglob(pattern))
    digest = hashlib.sha256()
    for file in (*files, *(measuring / name for name in MEASURED_BY)):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def machine_of(threads: int) -> str:
    return f"{processor()}, {threads} threads, level {instruction_level()}, torch {torch.__version__}"


class Journal:
    def __init__(self, path: Path, code: str, machine: str) -> None:
        self.path, self.code, self.machine = path, code, machine

    def note(self, record: Record) -> None:
        # The newline comes first: a line that a killed process left half written ends there.
        line = json.dumps({"code": self.code, "machine": self.machine, **record})
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + line)

    def read(self) -> dict[Cell, Record]:
        """The last record of every cell that this code on this machine has measured."""
        found: dict[Cell, Record] = {}
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text or "{}")
            except json.JSONDecodeError:
                continue
            if (line.get("code"), line.get("machine")) == (self.code, self.machine):
                found[Cell(*line["cell"])] = line
        return found
