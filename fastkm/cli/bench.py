"""``python -m fastkm bench``: real images in and out of the memory, each kernel verified before it is timed."""

import argparse
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastkm._files import write_text
from fastkm._runtime import dispatch
from fastkm.cli.console import check_writable, markdown_table, progress, show_table, tell_absent
from fastkm.cli.machine import machine
from fastkm.cli.picture import draw_picture
from fastkm.testing.episodes import Episode, build_episode, remarks
from fastkm.testing.extras import import_extra
from fastkm.testing.images import Images, load_images
from fastkm.testing.operations import GRADIENT_CASES, KERNEL_OPERATIONS, OPERATIONS, Case, computation
from fastkm.testing.peak import peak_of_step
from fastkm.testing.presets import LARGE, PRESETS, Preset
from fastkm.testing.timing import time_in_turn
from fastkm.testing.verification import definition_error, verify

TIMED = tuple(Case(operation) for operation in KERNEL_OPERATIONS)
GRADIENT_PRESETS = ("S", "M")  # where gradients are timed; at the others they are verified on one memory
SECONDS, SECONDS_QUICK = 1.0, 0.1  # spent on timing one case at one preset
TIME_LIMIT = 110.0  # seconds after which no further preset is begun, unless it was named
LARGE_BATCH = 4  # memories at the large presets, unless told how many: the literal loop takes minutes
LOOP = "literal loop"
RESULTS = ("bench.json", "bench.md", "read-back.png")
REPEATED = "reference again"  # the reference timed twice shows how far two timings of one thing differ
HEADERS = (
    "operation",
    "preset",
    "B",
    "backend",
    "max error",
    "allowed",
    "median ms",
    "± %",
    "per second",
    "× reference",
    "× loop",
)


def measure(case: Case, preset: Preset, episode: Episode, seconds: float) -> list[dict[str, Any]]:
    """One record for each backend and one for the literal loop; what fails its check is not timed."""
    op, form, verdicts = OPERATIONS[case.operation], computation(case), verify(case, episode)
    candidates: dict[str, Callable[[], object]]
    candidates = {name: form.bind(episode, name) for name, verdict in verdicts.items() if verdict.ok}
    if form.loop is not None:
        verdicts[LOOP] = definition_error(case, episode)
        candidates[LOOP] = partial(form.loop, episode)
    if "reference" in candidates:
        candidates[REPEATED] = candidates["reference"]
    timings = time_in_turn(candidates, seconds) if candidates and seconds else {}

    loop = timings.get(LOOP if form.loop else "reference")
    records = []
    for name, verdict in verdicts.items():
        record: dict[str, Any] = {**case._asdict(), "preset": preset._asdict(), "batch": len(episode.values)}
        record |= {"backend": name, **verdict._asdict()}
        if timing := timings.get(name):
            record |= {"seconds": timing._asdict(), "per_second": op.units(episode) / timing.median}
            record |= {"unit": op.unit}
            for key, base in (("vs_reference", timings.get("reference")), ("vs_literal_loop", loop)):
                record |= {key: base.median / timing.median} if base else {}
        if name == "reference" and REPEATED in timings:
            record |= {"seconds_again": timings[REPEATED]._asdict()}
        records.append(record)
    return records


def case_of(record: dict[str, Any]) -> Case:
    return Case(record["operation"], record["gradient"])


def row(record: dict[str, Any]) -> tuple[str, ...]:
    where = (str(case_of(record)), record["preset"]["name"], str(record["batch"]), record["backend"])
    if record["operation"] == "write" and record["backend"] == "reference":
        where = (*where[:3], "reference = loop")
    errors = (f"{record['error']:.1e}", "–" if record["backend"] == LOOP else f"{record['allowed']:.1e}")
    if "seconds" not in record:
        return (*where, *errors, "verified" if record["ok"] else "FAILED", "", "", "", "")
    timing = record["seconds"]
    spread = 50 * (timing["upper"] - timing["lower"]) / timing["median"]
    ratios = (f"{record[key]:.2f}" if key in record else "–" for key in ("vs_reference", "vs_literal_loop"))
    per_second = f"{record['per_second']:,.0f} {record['unit']}"
    return (*where, *errors, f"{1e3 * timing['median']:.3f}", f"{spread:.0f}", per_second, *ratios)


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    check_writable(*(output / name for name in RESULTS))
    import_extra("matplotlib")  # the picture is drawn at the end
    about = {**machine(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    print(*(f"{name:<18} {value}" for name, value in about.items()), sep="\n")

    images, presets = load_images(options.data), [PRESETS[name] for name in options.presets or PRESETS]
    print(f"{'images':<18} {images.source}", *remarks(images, presets), sep="\n")
    records = measure_all(options, images, presets)
    rows = [row(record) for record in records if record["ok"] is not None]
    noise = largest_repeat_gap(records)
    title = (
        f"{options.dtype}, Q = {options.queries}, n = {options.iters}, "
        f"threads: {options.threads}. Errors are relative to the largest entry; loop: the literal PyTorch loop; "
        "∇: forward and backward. "
        f"Two timings of the same reference lie up to {noise:.0%} apart."
    )
    show_table(title, HEADERS, rows, right=HEADERS[4:], group=1)
    for record in records:
        if record["ok"] is False:
            print(f"FAILED {case_of(record)} {record['preset']['name']} {record['backend']}: {record['note']}")
    absent: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record["ok"] is None:
            absent.setdefault((record["backend"], record["note"]), []).append(str(case_of(record)))
    tell_absent("timed", {record["backend"] for record in records if "seconds" in record}, absent)

    peaks = peak_memory(PRESETS["M"])
    told = ", ".join(
        f"{backend} {size / 2**20:,.1f} MiB" for backend, size in peaks["bytes"].items() if size is not None
    )
    print(f"Peak memory of a write and its backward, preset M, B = {peaks['batch']}: {told}")
    settings = {name: value for name, value in vars(options).items() if name not in ("run", "output")}
    report = {"machine": about, "images": images.source, "settings": settings, "records": records, "peak_memory": peaks}
    json_path, page, picture = (output / name for name in RESULTS)
    write_text(json_path, json.dumps(report, indent=1, default=str) + "\n")
    write_text(page, f"{title}\n\n{markdown_table(HEADERS, rows)}\n")
    errors = draw_picture(images, picture_preset(presets), picture)
    print(errors, f"Wrote {output}/{', '.join(RESULTS)}", sep="\n")
    return 1 if any(record["ok"] is False for record in records) else 0


def measure_all(options: argparse.Namespace, images: Images, presets: list[Preset]) -> list[dict[str, Any]]:
    """The records of every preset; where none was asked for by name, those that there is time for."""
    seconds, begin = SECONDS_QUICK if options.quick else SECONDS, time.perf_counter()
    records: list[dict[str, Any]] = []
    left_out: list[str] = []
    with progress("bench", len(presets) * len(TIMED + GRADIENT_CASES)) as start:
        for preset in presets:
            if options.presets is None and time.perf_counter() - begin > TIME_LIMIT:
                left_out.append(preset.name)
                continue
            batch = options.batch or (LARGE_BATCH if preset.name in LARGE else 16)
            episode = build_episode(images, preset, batch, options.queries, options.iters)
            episode = episode.to(getattr(torch, options.dtype))
            for case in TIMED:
                start(f"{case}, preset {preset.name}")
                records += measure(case, preset, episode, seconds)
            timed = preset.name in GRADIENT_PRESETS
            if not timed:
                episode = build_episode(images, preset, 1, options.queries, options.iters).to(episode.values.dtype)
            for case in GRADIENT_CASES:
                start(f"{case}, preset {preset.name}")
                records += measure(case, preset, episode, seconds if timed else 0.0)
    if left_out:
        print(f"Left out for want of time: {' '.join(left_out)}. To measure them: --presets {' '.join(left_out)}")
    return records


def peak_memory(preset: Preset, batch: int = 64) -> dict[str, Any]:
    """What forward and backward of a write add to the process at their peak, native against the literal loop."""
    peaks = {backend: peak_of_step(preset, batch, backend) for backend in dispatch.CAPABILITIES["write"]
             if dispatch.why_not("write", backend) is None}  # fmt: skip
    return {"preset": preset.name, "batch": batch, "bytes": peaks}


def largest_repeat_gap(records: list[dict[str, Any]]) -> float:
    """The largest relative gap between the two timings that each reference gets in one run."""
    pairs = ((r["seconds_again"]["median"], r["seconds"]["median"]) for r in records if "seconds_again" in r)
    return max((abs(again / first - 1) for again, first in pairs), default=0.0)


def picture_preset(presets: list[Preset]) -> Preset:
    """M, where a memory is as full as it gets with T = K and codes are sharp; else the last one asked for."""
    return PRESETS["M"] if PRESETS["M"] in presets else presets[-1]
