"""gpu.json and gpu.md, written anew whenever there is more to tell."""

import json
import os
import time
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Journal, Line
from benchmarks.gpu.steps import Run
from benchmarks.gpu.timing import MODES
from benchmarks.gpu.worker import QUERIES
from fastkm.cli.console import markdown_table
from fastkm.testing import roofline
from fastkm.testing.operations import Case

HEADERS = ("operation", "preset", "B", "candidate", "max error", *(f"{mode} µs" for mode in MODES), "% of the bound")
CHECKED = ("operation", "preset", "B", "candidate", "max error", "allowed", "")
BOUND_BATCH = 64
OFTEN = 5  # seconds between two reports of one step
WORDS = 160  # of a step in a table


class Report:
    def __init__(self, folder: Path, run: Run):
        self.folder, self.run = folder, run
        self.steps: list[dict[str, Any]] = []
        self.written = 0.0
        self.date = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def write(self) -> None:
        found = {
            "machine": {**self.run.device, **self.run.package, **facts(self.run.timed), "date": self.date},
            "steps": self.steps,
            "verified": records_of(self.run.verified),
            "records": records_of(self.run.timed),
        }
        found["bound"] = self.bound
        self.folder.mkdir(parents=True, exist_ok=True)
        replace(self.folder / "gpu.json", json.dumps(found, indent=1) + "\n")
        replace(self.folder / "gpu.md", "\n\n".join(page(found)) + "\n")
        self.written = time.monotonic()

    @cached_property
    def bound(self) -> dict[str, Any]:
        title, headers, lines = roofline.bound_table(BOUND_BATCH, QUERIES)
        return {str(BOUND_BATCH): {"title": title, "headers": headers, "rows": lines}}

    def write_now_and_then(self) -> None:
        if time.monotonic() - self.written > OFTEN:
            self.write()


def replace(path: Path, text: str) -> None:
    """The old text or the new one, whenever the process ends."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def facts(journals: list[Journal]) -> Line:
    return {name: value for journal in journals for name, value in journal.read().facts.items()}


def records_of(journals: list[Journal]) -> list[Line]:
    return [line["record"] for journal in journals for line in journal.read().ended.values() if "record" in line]


# ---- the page ------------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> list[str]:
    parts = [f"Device: {found['machine'].get('device', 'unknown')}"]
    parts.append(markdown_table(("step", "status", "s", ""), step_rows(found["steps"])))
    measured = [timed_row(record) for record in found["records"]]
    parts.append(markdown_table(HEADERS, measured) if measured else "Nothing was timed.")
    checked = [checked_row(record) for record in found["verified"]]
    if checked:
        parts.append("Verified against float64:\n\n" + markdown_table(CHECKED, checked))
    bounds = (
        f"{bound['title']}\n\n{markdown_table(bound['headers'], bound['rows'])}" for bound in found["bound"].values()
    )
    return [*parts, *bounds]


def step_rows(steps: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(step["step"], step["status"], f"{step['seconds']:.0f}", brief(step["told"])) for step in steps]


def brief(told: str) -> str:
    """The first line, and the last, where a program says what was wrong."""
    lines = told.replace("|", "/").strip().splitlines()
    shown = lines if len(lines) < 2 else [lines[0], lines[-1]]
    return " … ".join(line if len(line) <= WORDS else line[:WORDS] + "…" for line in shown)


def label(record: Line) -> str:
    return str(Case(record["operation"], record["gradient"]))


def place(record: Line) -> tuple[str, ...]:
    return label(record), record["preset"], str(record["batch"]), record["candidate"]


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def checked_row(record: Line) -> tuple[str, ...]:
    errors = (number(record.get("error")), number(record.get("allowed")))
    return (*place(record), *errors, brief(record["refused"]) or "right")


def timed_row(record: Line) -> tuple[str, ...]:
    error = number(record.get("error"))
    if "seconds" not in record:
        return (*place(record), error, *["–"] * len(MODES), brief("not timed: " + record.get("refused", "")))
    times = {mode: timing["median"] for mode, timing in record["seconds"].items()}
    cells = (f"{1e6 * times[mode]:.1f}" if mode in times else "–" for mode in MODES)
    best = min(times[mode] for mode in ("cold", "graph cold") if mode in times)
    return (*place(record), error, *cells, f"{record['bound_seconds'] / best:.0%}")
