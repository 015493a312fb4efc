"""What a worker notes of each item, one line of JSON when it begins and one when it ends.

A kernel can stop its process or never return. The journal then says which item did it, and a new process goes on with
the others.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

Line = dict[str, Any]


class Entries(NamedTuple):
    ended: dict[str, Line]  # by item: outcome is passed, failed or skipped; told says why
    open: str | None  # the item that has begun and not ended
    doing: str  # what the open item was about to do
    facts: Line  # what a worker noted of its surroundings


class Journal:
    def __init__(self, path: Path | str):
        self.path = Path(path)

    def note(self, **line: Any) -> None:
        # The newline comes first: a line that a killed process left half written ends there.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line))

    def begin(self, item: str, doing: str = "") -> None:
        self.note(begin=item, doing=doing)

    def end(self, item: str, outcome: str, told: str = "", **more: Any) -> None:
        self.note(item=item, outcome=outcome, told=told, **more)

    def read(self) -> Entries:
        ended: dict[str, Line] = {}
        begun, doing, facts = None, "", {}
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text or "{}")
            except json.JSONDecodeError:
                continue
            if "begin" in line:
                begun, doing = line["begin"], line["doing"]
            elif "item" in line:
                ended[line["item"]] = line
            facts |= line.get("facts", {})
        return Entries(ended, begun if begun not in ended else None, doing, facts)


def count(lines: list[Line]) -> Counter[str]:
    """How many items passed, failed and were skipped."""
    return Counter(line["outcome"] for line in lines)
