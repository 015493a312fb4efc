"""Fill the tables of the documentation from what the code says and what the last run of a command measured.

Run by `make readme` after a benchmark, and by `make study` with `--study`.
"""

import json
import re
import sys
from pathlib import Path

from fastkm.cli.doctor import capability_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def fill(text: str, marker: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda found: f"{found[1]}{content.strip()}\n{found[2]}", text)
    if count != 1:
        raise SystemExit(f"the page must hold <!-- {marker} --> and <!-- /{marker} --> once, found {count}")
    return filled


def bench_section() -> str:
    machine = json.loads((RESULTS / "bench.json").read_text())["machine"]
    facts = ", ".join(f"{name} {machine[name]}" for name in ("processor", "threads", "instruction level", "torch"))
    return f"Printed by `make bench` on {facts}.\n\n" + (RESULTS / "bench.md").read_text()


def study_section() -> str:
    machine = json.loads((RESULTS / "study" / "study.json").read_text())["machine"]
    facts = ", ".join(f"{name} {machine[name]}" for name in ("processor", "threads", "torch"))
    return f"Printed by `make study` on {facts}.\n\n" + (RESULTS / "study" / "study.md").read_text()


def update(path: Path, **sections: str) -> None:
    text = path.read_text()
    for marker, content in sections.items():
        text = fill(text, marker, content)
    path.write_text(text)


def main() -> None:
    if "--study" in sys.argv[1:]:
        update(ROOT / "docs" / "generative-model.md", study=study_section())
    else:
        update(ROOT / "README.md", capabilities=capability_table(), bench=bench_section())


if __name__ == "__main__":
    main()
