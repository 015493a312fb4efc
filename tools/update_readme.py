"""Fill the README's tables from what the code says and what the last `python -m fastkm bench` measured.

Run by `make readme`.
"""

import json
import re
from pathlib import Path

from fastkm.cli.doctor import capability_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def fill(text: str, marker: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda found: f"{found[1]}{content.strip()}\n{found[2]}", text)
    if count != 1:
        raise SystemExit(f"README.md must hold <!-- {marker} --> and <!-- /{marker} --> once, found {count}")
    return filled


def bench_section() -> str:
    machine = json.loads((RESULTS / "bench.json").read_text())["machine"]
    facts = ", ".join(f"{name} {machine[name]}" for name in ("processor", "threads", "instruction level", "torch"))
    return f"Printed by `make bench` on {facts}.\n\n" + (RESULTS / "bench.md").read_text()


def main() -> None:
    readme = ROOT / "README.md"
    text = fill(readme.read_text(), "capabilities", capability_table())
    readme.write_text(fill(text, "bench", bench_section()))


if __name__ == "__main__":
    main()
