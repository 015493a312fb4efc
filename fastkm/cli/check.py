"""``python -m fastkm check``: every operation, backend, dtype and preset against float64."""

import argparse

import torch

from fastkm.cli.console import progress, show_table, tell_absent
from fastkm.testing.episodes import build_episode, remarks
from fastkm.testing.images import load_images
from fastkm.testing.operations import CASES, Case
from fastkm.testing.presets import PRESETS
from fastkm.testing.verification import Verdict, verify

DTYPES = (torch.float32, torch.float64)
HEADERS = ("operation", "preset", "dtype", "backend", "error", "allowed", "verdict")


def row(case: Case, preset: str, dtype: torch.dtype, backend: str, verdict: Verdict) -> tuple[str, ...]:
    where = (str(case), preset, str(dtype).removeprefix("torch."), backend)
    return (*where, f"{verdict.error:.1e}", f"{verdict.allowed:.1e}", "ok" if verdict.ok else "FAILED")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    images = load_images(options.data)
    presets = [PRESETS[name] for name in options.presets or PRESETS]
    print(f"Images: {images.source}", *remarks(images, presets), sep="\n")
    rows: list[tuple[str, ...]] = []
    failures: list[str] = []
    absent: dict[tuple[str, str], list[str]] = {}
    with progress("check", len(presets) * len(DTYPES) * len(CASES)) as start:
        for preset in presets:
            exact = build_episode(images, preset, options.batch, options.queries, options.iters)
            for dtype in DTYPES:
                episode = exact.to(dtype)
                for case in CASES:
                    start(f"{case}, preset {preset.name}, {dtype}")
                    for backend, verdict in verify(case, episode).items():
                        if verdict.ok is None:
                            absent.setdefault((backend, verdict.note), []).append(str(case))
                            continue
                        rows.append(row(case, preset.name, dtype, backend, verdict))
                        if not verdict.ok:
                            failures.append(f"{' '.join(rows[-1][:4])}: {verdict.note}")
    title = f"Errors relative to the largest entry of the worst field; {options.batch} memories each"
    show_table(title, HEADERS, rows, right=HEADERS[4:6], group=1)
    tell_absent("checked", {backend for _, _, _, backend, *_ in rows}, absent)
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(rows) - len(failures)} of {len(rows)} within the allowed error")
    return 1 if failures else 0
