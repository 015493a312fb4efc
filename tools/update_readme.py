"""Write the generated parts of the documentation: tables, the figure of the front page, and the pages of docs/results.

``make readme`` runs it after a benchmark: what was measured is kept in docs/results/benchmark.json, and everything that
shows a time is made from that file. ``--pages`` makes the pages again without measuring. ``make study`` runs it with
``--study``.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fastkm.cli.console import markdown_table
from fastkm.cli.doctor import capability_table
from fastkm.testing.extras import import_extra

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"  # what the commands write; not kept
DOCS = ROOT / "docs"
BENCHMARK = DOCS / "results" / "benchmark.json"  # what is kept of it
FIGURE = DOCS / "images" / "speed.svg"

PRESET, BATCH, QUERIES = "M", 16, 32  # of the front page
SHOWN = ("update_posterior", "write", "read")
FRONT = tuple((operation, gradient) for gradient in (False, True) for operation in SHOWN)
LOOP, OWN, REFERENCE = "literal loop", "native", "reference"
HEADERS = ("operation", "preset", "B", "backend", "max error", "allowed", "median ms", "± %", "per second",
           "× reference", "× loop")  # fmt: skip
FRONT_HEADERS = ("", "PyTorch loop", "PyTorch, best form", "fastkm", "times faster", "error / allowed")


# ---- what was measured ---------------------------------------------------------------------------------------------


def collect() -> dict[str, Any]:
    """What the pages need of results/bench.json and, for the front page, of results/front/suite.json."""
    report = json.loads((RESULTS / "bench.json").read_text(encoding="utf-8"))
    title = (RESULTS / "bench.md").read_text(encoding="utf-8").partition("\n")[0]
    suite = RESULTS / "front" / "suite.json"
    groups = json.loads(suite.read_text(encoding="utf-8"))["groups"] if suite.exists() else []
    records = [bench_record(r) for r in report["records"] if r["ok"] is not None]  # None: cannot run here
    return {"machine": report["machine"], "title": title, "records": records, "front": front(records, groups)}


def bench_record(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: record[key] for key in ("operation", "gradient", "batch", "backend", "error", "allowed", "ok")}
    kept["preset"] = record["preset"]["name"]
    if timing := record.get("seconds"):
        kept["ms"] = 1e3 * timing["median"]
        kept["spread"] = 50 * (timing["upper"] - timing["lower"]) / timing["median"]
        kept |= {"per_second": record["per_second"], "unit": record["unit"]}
    return kept


class Line(NamedTuple):
    """A line of the front page, from one run of one command; times in ms."""

    name: str
    loop: float
    best: float | None  # None: this command has no form in PyTorch but the loop
    form: str  # which form is the best
    own: float
    error: float  # of the native kernel, over what is allowed
    command: str


def front(records: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each case: from the full benchmark if its group was quiet enough to tell, else from the short one."""
    lines = []
    for operation, gradient in FRONT:
        case = {"operation": operation, "gradient": gradient}
        full = [line for group in groups if matches(group, case) and (line := line_of_group(group))]
        short = line_of_records([r for r in records if matches(r, case | {"preset": PRESET, "batch": BATCH})])
        lines.append((full[0] if full else short)._asdict())
    return lines


def line_of_group(group: dict[str, Any]) -> Line | None:
    wanted = (group["preset"]["name"], group["batch"], group["dtype"], group["queries"])
    if group["void"] or wanted != (PRESET, BATCH, "float32", QUERIES):
        return None
    timed = [c for c in group["candidates"] if "seconds" in c]
    loop, own = ([c for c in timed if c["kind"] == kind] for kind in ("loop", OWN))
    forms = [c for c in timed if c["kind"] in (REFERENCE, "eager", "compiled")]
    if not (loop and own and forms):
        return None
    best = min(forms, key=lambda c: c["seconds"]["median"])
    loop_ms, best_ms, own_ms = (1e3 * c["seconds"]["median"] for c in (loop[0], best, own[0]))
    error = own[0]["error"] / own[0]["allowed"]
    return Line(line_name(group), loop_ms, best_ms, best["candidate"], own_ms, error, "make readme")


def line_of_records(records: list[dict[str, Any]]) -> Line:
    by_backend = {r["backend"]: r for r in records}
    reference, own = by_backend[REFERENCE]["ms"], by_backend[OWN]
    error = own["error"] / own["allowed"]
    if LOOP in by_backend:
        loop, best, form = by_backend[LOOP]["ms"], reference, REFERENCE
    else:  # the reference is the loop
        loop, best, form = reference, None, ""
    return Line(line_name(own), loop, best, form, own["ms"], error, "make bench")


def line_name(record: dict[str, Any]) -> str:
    return record["operation"].removesuffix("_posterior") + (" + gradient" if record["gradient"] else "")


def matches(record: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(record[key] == value for key, value in wanted.items())


# ---- the front page ------------------------------------------------------------------------------------------------


def front_lines(kept: dict[str, Any]) -> list[Line]:
    return [Line(**line) for line in kept["front"]]


def front_table(kept: dict[str, Any]) -> str:
    rows = []
    for line in front_lines(kept):
        faster = [f"{base / line.own:.2g}×" if base / line.own < 10 else f"{base / line.own:.0f}×"
                  for base in (line.loop, line.best) if base]  # fmt: skip
        best = milliseconds(line.best) if line.best else "–"
        times = (milliseconds(line.loop), best, f"**{milliseconds(line.own)}**")
        rows.append((line.name, *times, " / ".join(faster), f"{line.error:.2f}"))
    facts, lines = kept["machine"], front_lines(kept)
    commands = " and ".join(f"`{name}`" for name in sorted({line.command for line in lines}))
    where = (
        f"Printed by {commands}: B = {BATCH}, float32, preset {PRESET} (K = 64, C = 200, T = 64), "
        f"{facts['threads']} threads, level {facts['instruction level']}, torch {facts['torch']}."
    )
    missing = ", ".join(line.name for line in lines if line.best is None)
    note = f"\n\nNo form in PyTorch but the loop was timed of: {missing}. `make bench-full` times leaner ones."
    return f"{where}\n\n{markdown_table(FRONT_HEADERS, rows)}{note if missing else ''}"


def milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"


def draw(kept: dict[str, Any], path: Path) -> None:
    """Times on the left, on a logarithmic axis; errors against what is allowed on the right."""
    import_extra("matplotlib").use("Agg")
    pyplot = import_extra("matplotlib.pyplot")
    pyplot.rcParams |= {"svg.hashsalt": "fastkm", "font.size": 10}
    lines = front_lines(kept)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9.6, 4.1), width_ratios=(3, 1), sharey=True, layout="constrained"
    )
    series = (
        ("PyTorch loop", "loop", "#c9ced6"),
        ("PyTorch, best form", "best", "#8a94a6"),
        ("fastkm", "own", "#1f6feb"),
    )
    for offset, (label, field, colour) in zip((-0.27, 0, 0.27), series, strict=True):
        shown = [(i + offset, value) for i, line in enumerate(lines) if (value := getattr(line, field))]
        bars = left.barh(*zip(*shown, strict=True), height=0.25, color=colour, label=label)
        left.bar_label(bars, [milliseconds(value) for _, value in shown], padding=3, fontsize=8, color="#555")
    left.set(xscale="log", xlabel="milliseconds a call, logarithmic", xticks=(1, 10, 100), yticks=range(len(lines)))
    left.set_xticklabels(("1", "10", "100"))
    left.set_yticklabels([line.name for line in lines])
    left.invert_yaxis()
    left.margins(x=0.12)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    right.barh(range(len(lines)), [line.error for line in lines], height=0.45, color="#1f6feb")
    right.axvline(1, color="#d1242f", linewidth=1)
    right.set(xlim=(0, 1.15), xlabel="error / allowed", xticks=(0, 0.5, 1))
    right.text(1, 1.02, "allowed", transform=right.get_xaxis_transform(), color="#d1242f", fontsize=9, ha="center")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


# ---- the pages -----------------------------------------------------------------------------------------------------


def benchmark_page(kept: dict[str, Any]) -> str:
    facts = ", ".join(
        f"{name} {kept['machine'][name]}" for name in ("processor", "threads", "instruction level", "torch")
    )
    return f"Printed by `make bench` on {facts}.\n\n{kept['title']}\n\n{bench_table(kept)}"


def bench_table(kept: dict[str, Any]) -> str:
    groups: dict[tuple, dict[str, float]] = {}
    for record in kept["records"]:
        if "ms" in record:
            groups.setdefault(group_of(record), {})[record["backend"]] = record["ms"]
    return markdown_table(HEADERS, [bench_row(r, groups.get(group_of(r), {})) for r in kept["records"]])


def group_of(record: dict[str, Any]) -> tuple:
    return tuple(record[key] for key in ("operation", "gradient", "preset", "batch"))


def bench_row(record: dict[str, Any], times: dict[str, float]) -> tuple[str, ...]:
    name = record["operation"] + (" + ∇" if record["gradient"] else "")
    is_loop = record["operation"] == "write" and record["backend"] == REFERENCE
    where = (name, record["preset"], str(record["batch"]), "reference = loop" if is_loop else record["backend"])
    allowed = "–" if record["backend"] == LOOP else f"{record['allowed']:.1e}"
    errors = (f"{record['error']:.1e}", allowed)
    if "ms" not in record:
        return (*where, *errors, "verified" if record["ok"] else "FAILED", "", "", "", "")
    ms, reference = record["ms"], times.get(REFERENCE)
    ratios = (f"{base / ms:.2f}" if base else "–" for base in (reference, times.get(LOOP, reference)))
    per_second = f"{record['per_second']:,.0f} {record['unit']}"
    return (*where, *errors, f"{ms:.3f}", f"{record['spread']:.0f}", per_second, *ratios)


def study_section() -> str:
    machine = json.loads((RESULTS / "study" / "study.json").read_text(encoding="utf-8"))["machine"]
    facts = ", ".join(f"{name} {machine[name]}" for name in ("processor", "threads", "torch"))
    return f"Printed by `make study` on {facts}.\n\n" + (RESULTS / "study" / "study.md").read_text(encoding="utf-8")


def fill(text: str, marker: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda found: f"{found[1]}{content.strip()}\n{found[2]}", text)
    if count != 1:
        raise SystemExit(f"the page must hold <!-- {marker} --> and <!-- /{marker} --> once, found {count}")
    return filled


def update(path: Path, **sections: str) -> None:
    text = path.read_text(encoding="utf-8")
    for marker, content in sections.items():
        text = fill(text, marker, content)
    path.write_text(text, encoding="utf-8")


def write_pages() -> None:
    kept = json.loads(BENCHMARK.read_text(encoding="utf-8"))
    update(ROOT / "README.md", capabilities=capability_table(), front=front_table(kept))
    update(DOCS / "results" / "benchmark.md", bench=benchmark_page(kept))
    update(DOCS / "results" / "capabilities.md", capabilities=capability_table())
    draw(kept, FIGURE)


def main(arguments: list[str]) -> None:
    if "--study" in arguments:
        update(DOCS / "results" / "generative-model.md", study=study_section())
        return
    if "--pages" not in arguments:
        text = json.dumps(collect(), indent=1, default=str, ensure_ascii=False) + "\n"
        BENCHMARK.write_text(text, encoding="utf-8")
    write_pages()


if __name__ == "__main__":
    main(sys.argv[1:])
