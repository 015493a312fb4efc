"""Results of trainings, kept in a file after every run, so that a command that was stopped goes on where it was."""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def load(path: Path) -> list[Record]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def train_missing(path: Path, runs: Iterable[Record], train: Callable[..., Record]) -> list[Record]:
    """What ``train(**run)`` found, for each of the runs; those that the file holds are not trained again."""
    records = load(path)
    for run in runs:
        if find(records, **run):
            continue
        begin = time.process_time()
        record = run | train(**run) | {"seconds": round(time.process_time() - begin, 1)}
        print(record, flush=True)
        records.append(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    return [record for run in runs for record in find(records, **run)]


def find(records: Iterable[Record], **given: Any) -> list[Record]:
    """The records that have these entries."""
    return [record for record in records if given.items() <= record.items()]


def spread(numbers: list[float], form: str = ".4f") -> str:
    """Mean ± standard deviation; the number alone where there is one, and a dash where there is none."""
    if len(numbers) < 2:
        return format(numbers[0], form) if numbers else "–"
    return f"{statistics.mean(numbers):{form}} ± {statistics.stdev(numbers):{form}}"
