"""One JSON, one Markdown page, pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import NATIVE, QUERIES
from benchmarks.claims import best_pytorch, by_name, candidate, median, ratio
from benchmarks.forms import LOOP
from fastkm._files import replace_file, write_text
from fastkm.cli.console import markdown_table, show_table
from fastkm.testing.extras import import_extra
from fastkm.testing.operations import Case

HEADERS = ("operation", "preset", "B", "Q", "dtype", "candidate", "error", "allowed", "median ms", "± %", "per second",
           "Gflop/s", "% product", "GB/s", "% copy", "native is × faster")  # fmt: skip
SUMMARY = ("operation", "preset", "B", "Q", "dtype", "native ms", "% product / copy", "PyTorch ms", "best of PyTorch",
           "× best", "× loop")  # fmt: skip
TIME_PICTURE, CEILING_PICTURE = "time.png", "ceiling.png"
RESULTS = ("suite.json", "suite.md", TIME_PICTURE, CEILING_PICTURE)
CLAIMS = ("", "promise", "target", "measured", "verdict")
EAGER_OF_SWEEPS = {
    "write": "Gram space, Woodbury, state only",
    "update_posterior": "gain form, state only",
    "read": "K-space, matrix power",
}
COLOURS = {"write": "tab:blue", "update_posterior": "tab:orange", "read": "tab:green"}


def case_label(group: dict[str, Any]) -> str:
    return str(Case(group["operation"], group["gradient"]))


def add_percentages(data: dict[str, Any]) -> None:
    """Rates of every timed candidate, and their share of the ceilings of the run."""
    product, bandwidth = data["ceiling"]["product"], data["ceiling"]["bandwidth"]
    for group in (*data["groups"], *data["sweeps"]):
        for record in group["candidates"]:
            if "seconds" not in record:
                continue
            seconds = record["seconds"]["median"]
            flops, moved = group["flops"] / seconds, group["bytes"] / seconds
            record |= {"flops": flops, "bytes": moved, "per_second": group["units"] / seconds}
            record |= {"of_product": flops / product[group["dtype"]], "of_bandwidth": moved / bandwidth}
            record["of_bound"] = max(record["of_product"], record["of_bandwidth"])  # of the time that cannot be beaten
            base = median(group, NATIVE)
            if base and record["kind"] not in ("native", "again", "other job"):
                record["native_faster"] = seconds / base


def row(group: dict[str, Any], record: dict[str, Any], best: dict | None) -> tuple[str, ...]:
    where = (case_label(group), group["preset"]["name"], str(group["batch"]), f"{group['queries']:,}", group["dtype"])
    name = record["candidate"] + (" (best PyTorch)" if best is record else "")
    errors = (f"{record['error']:.1e}", f"{record['allowed']:.1e}") if record.get("allowed") else ("–", "–")
    if record["status"] != "timed":
        return (*where, name, *errors, "FAILED" if record["status"] == "failed" else "–", record["note"], *[""] * 6)
    seconds = record["seconds"]
    spread = 50 * (seconds["upper"] - seconds["lower"]) / seconds["median"]
    faster = f"{record['native_faster']:.2f}" if "native_faster" in record else "–"
    if group["void"]:
        faster = "void"
    rates = ("–",) * 4 if record["kind"] == "other job" else (
        f"{record['flops'] / 1e9:.1f}", f"{100 * record['of_product']:.0f}",
        f"{record['bytes'] / 1e9:.2f}", f"{100 * record['of_bandwidth']:.0f}",
    )  # fmt: skip
    per_second = f"{record['per_second']:,.0f} {group['unit']}"
    return (*where, name, *errors, f"{1e3 * seconds['median']:.4g}", f"{spread:.0f}", per_second, *rates, faster)


def rows(groups: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [row(g, r, best_pytorch(g)) for g in groups for r in g["candidates"]]


def summary(groups: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line a group: native against the best of PyTorch and the literal loop."""
    lines = []
    for g in groups:
        own, best = candidate(g, NATIVE), best_pytorch(g)
        where = (case_label(g), g["preset"]["name"], str(g["batch"]), f"{g['queries']:,}", g["dtype"])
        if not own or own["status"] != "timed":
            lines.append((*where, "FAILED" if own and own["status"] == "failed" else "–", *[""] * 5))
            continue
        bound = f"{100 * own['of_product']:.0f} / {100 * own['of_bandwidth']:.0f}"
        times = (f"{x:.2f}" if (x := ratio(g, base)) else "–" for base in (best, by_name(LOOP)(g)))
        told = (f"{1e3 * best['seconds']['median']:.4g}", best["candidate"]) if best else ("–", "–")
        times = ("void", "void") if g["void"] else times
        lines.append((*where, f"{1e3 * own['seconds']['median']:.4g}", bound, *told, *times))
    return lines


def facts_of_calls(calls: dict[str, Any]) -> list[str]:
    if not calls:
        return []
    told = [f"Import of fastkm after torch: {calls['import_ms']['median']:.0f} ms (median of fresh processes)."]
    first = calls["first_call_ms"]
    told.append(f"write, preset S, B = 16: first call {first['first']:.2f} ms, later {first['steady']:.2f} ms.")
    for r in calls["overhead_us"]:
        added = r["call"] - r["operator"]
        told.append(f"{r['operation']}, numbers as {r['given']}: {r['call']:.1f} µs a call, of which operator "
                    f"{r['operator']:.1f} µs, beyond it {added:.1f} µs.")  # fmt: skip
    told.append(f"Overhead is {calls['overhead_is']}.")
    peaks = ", ".join(
        f"{name} {size / 2**20:,.1f} MiB" for name, size in calls["peak_bytes"].items() if size is not None
    )
    told.append(f"Peak memory of {calls['peak_of']}: {peaks}.")
    return told


def write(data: dict[str, Any], ceilings: str, output: Path) -> None:
    write_text(output / "suite.json", json.dumps(data, indent=1, default=str) + "\n")
    lines = rows(data["groups"])
    if data["groups"]:
        title = "Medians; every candidate is in suite.md"
        show_table(title, SUMMARY, summary(data["groups"]), right=SUMMARY[5:], group=1)
    void = [f"{case_label(g)} {g['preset']['name']} B = {g['batch']} {g['dtype']} Q = {g['queries']}: "
            f"{', '.join(f'{x:.0%}' for x in g['gaps'])}" for g in data["groups"] if g["void"]]  # fmt: skip
    promises = [(str(c["number"]), c["what"], c["target"], c["measured"], c["verdict"]) for c in data["claims"]]
    show_table("Must show", CLAIMS, promises)
    facts = [f"{name}: {value}" for name, value in data["machine"].items()] + [f"ceilings of this run: {ceilings}"]
    told = facts_of_calls(data["calls"])
    print(*told, sep="\n")
    if void:
        print("VOID, because two timings of one thing differ too much in every attempt:", *void, sep="\n  ")
    pictures = draw(data, output)
    parts = [
        "# The full benchmark",
        "\n".join(f"* {fact}" for fact in facts),
        "## Must show\n\n" + markdown_table(CLAIMS, promises),
        "## Calls\n\n" + "\n".join(f"* {fact}" for fact in told) if told else "",
        "## Void\n\n" + ("\n".join(f"* {line}" for line in void) if void else "Nothing."),
        "## Every candidate\n\n" + markdown_table(HEADERS, lines) if lines else "",
        "\n".join(f"![{name}]({name})" for name in pictures),
    ]
    write_text(output / "suite.md", "\n\n".join(part for part in parts if part) + "\n")
    print(f"Wrote {output}/suite.json, suite.md {' '.join(pictures)} in {data['machine']['minutes']} minutes")


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw(data: dict[str, Any], output: Path) -> list[str]:
    import_extra("matplotlib").use("Agg")
    plt = import_extra("matplotlib.pyplot")
    made = []
    if data["sweeps"]:
        made.append((TIME_PICTURE, draw_sweeps(plt, data["sweeps"])))
    if any(candidate(g, NATIVE) for g in data["groups"]):
        made.append((CEILING_PICTURE, draw_ceiling(plt, data["groups"])))
    for name, figure in made:
        with replace_file(output / name) as file:
            figure.savefig(file, dpi=120)
    plt.close("all")
    return [name for name, _ in made]


def draw_sweeps(plt, sweeps: list[dict[str, Any]]):
    """Time against B, T, K and C on log axes: native solid, PyTorch dashed, void points hollow."""
    letters = list(dict.fromkeys(g["letter"] for g in sweeps))
    figure, axes = plt.subplots(1, len(letters), figsize=(4.2 * len(letters), 4), sharey=True, layout="constrained")
    for letter, axis in zip(letters, axes if len(letters) > 1 else [axes], strict=True):
        for operation, colour in COLOURS.items():
            for name, style in ((NATIVE, "-"), (EAGER_OF_SWEEPS[operation], "--")):
                own = [g for g in sweeps if (g["letter"], g["operation"]) == (letter, operation) and median(g, name)]
                points = [(g["size"], 1e3 * median(g, name), g["void"]) for g in own]
                if points:
                    x, y, void = zip(*points, strict=True)
                    label = f"{operation}, {'native' if name == NATIVE else 'PyTorch'}"
                    axis.loglog(x, y, style, color=colour, label=label)
                    for i, hollow in enumerate(void):
                        axis.plot(x[i], y[i], "o", color=colour, fillstyle="none" if hollow else "full", markersize=4)
        axis.set_xlabel(letter)
        axis.grid(True, which="both", alpha=0.2)
    figure.axes[0].set_ylabel("ms a call")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle("Preset S, B = 16, float32, one letter changed at a time; hollow: void")
    return figure


def draw_ceiling(plt, groups: list[dict[str, Any]]):
    """Share of the bound that product rate or bandwidth sets, of the native kernel and of the best of PyTorch."""
    shown = [g for g in groups if g["dtype"] == "float32" and median(g, NATIVE)]
    figure, axis = plt.subplots(figsize=(max(6, 0.28 * len(shown)), 5), layout="constrained")
    many = [f" Q={g['queries']:,}" if g["queries"] != QUERIES else "" for g in shown]
    names = [f"{case_label(g)} {g['preset']['name']} B={g['batch']}{q}" for g, q in zip(shown, many, strict=True)]
    for offset, colour, pick in ((-0.2, "tab:blue", lambda g: candidate(g, NATIVE)), (0.2, "tab:gray", best_pytorch)):
        heights = [100 * (pick(g) or {}).get("of_bound", 0) for g in shown]
        label = "native" if offset < 0 else "best PyTorch"
        axis.bar([i + offset for i in range(len(shown))], heights, 0.4, color=colour, label=label)
    axis.set_xticks(range(len(shown)), names, rotation=90, fontsize=6)
    axis.set_ylabel("% of the bound set by matrix product or copy")
    axis.legend()
    axis.grid(True, axis="y", alpha=0.3)
    return figure
