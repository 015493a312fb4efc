"""The process that verifies candidates on the device, and times those that are right, each an item of its journal.

python -m benchmarks.gpu.worker --journal FILE --settings S:64 M:64 --kinds native reference [--time] [--shard 0/8]
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from benchmarks.gpu import candidates, probe, timing
from benchmarks.gpu.data import find_images
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.runner import LOST
from fastkm.testing import roofline
from fastkm.testing.episodes import Episode, build_episode
from fastkm.testing.images import Images
from fastkm.testing.operations import Case
from fastkm.testing.presets import PRESETS, Preset

QUERIES, ITERS = 32, 10


class Setting(NamedTuple):
    preset: Preset
    batch: int

    def __str__(self) -> str:
        return f"{self.preset.name} B={self.batch}"


def setting(text: str) -> Setting:
    """``S:64``: a preset and how many memories."""
    name, _, batch = text.partition(":")
    if name not in PRESETS or not batch.isdecimal() or int(batch) < 1:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(PRESETS)} and a batch, as in S:64; got {text!r}")
    return Setting(PRESETS[name], int(batch))


def on_device(images: Images, where: Setting) -> Episode:
    episode = build_episode(images, where.preset, where.batch, QUERIES, ITERS).to(torch.float32)
    return tree_map(lambda x: x.to(probe.DEVICE) if isinstance(x, torch.Tensor) else x, episode)


class Worker:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.journal = Journal(options.journal)
        self.settled = self.journal.read().ended
        # A candidate that was wrong or hung when it was verified before is not tried again.
        earlier = [Journal(path).read().ended for path in options.earlier]
        self.wrong = {item: line for ended in earlier for item, line in ended.items() if line["outcome"] == "failed"}
        self.watch: timing.Stopwatch | None = None

    def run(self) -> None:
        images = find_images(self.options.data)
        self.journal.note(facts={"data": images.source})
        if self.options.time:
            self.watch = timing.Stopwatch(self.options.rounds)
            self.journal.note(facts={"copy bytes/s": self.watch.copy_bandwidth()})
        shard, shards = map(int, self.options.shard.split("/"))
        groups = [(where, case) for where in self.options.settings for case in candidates.CASES][shard::shards]
        built: tuple[Setting, Episode] | None = None
        for where, case in groups:
            if built is None or built[0] != where:
                built = None  # the memory of the last episode is free before the next is built
                built = where, on_device(images, where)
            self.do_case(case, where, built[1])

    def do_case(self, case: Case, where: Setting, episode: Episode) -> None:
        torch._dynamo.reset()  # or the ninth call compiled here would silently run uncompiled
        judge = candidates.Judge(case, episode)
        for name, call in candidates.candidates(case, episode, self.options.kinds).items():
            item = f"{case} {where} {name}"
            if item in self.settled:
                continue
            record = {**case._asdict(), "preset": where.preset.name, "batch": where.batch, "candidate": name}
            record["precision"] = candidates.precision_of(name)
            self.journal.begin(item, "verification")
            try:
                outcome = self.do_candidate(item, judge, call, record)
            except Exception as error:  # too little memory, for example; the others are still done
                told = f"{type(error).__name__}: {error}"
                outcome = ("failed", told)
                record["refused"] = told.splitlines()[0]
                torch.cuda.empty_cache() if not probe.device_is_lost() else None
            self.journal.end(item, *outcome, record=record)
            print(item, *outcome, flush=True)
            if outcome[0] == "failed" and probe.device_is_lost():
                os._exit(LOST)

    def do_candidate(self, item: str, judge: candidates.Judge, call: candidates.Call, record: dict[str, Any]):
        """Outcome and words; what was found is added to ``record``."""
        if item in self.wrong:
            record["refused"] = self.wrong[item]["told"].splitlines()[0]
            return "skipped", f"failed before: {record['refused']}"
        verdict = judge.verdict(record["candidate"], call)
        numbers = {"error": verdict.error, "allowed": verdict.allowed}
        record |= {
            name: number if math.isfinite(number) else None for name, number in numbers.items()
        }  # JSON has no NaN
        record["refused"] = "" if verdict.ok else verdict.note
        if not verdict.ok:
            return ("skipped" if verdict.ok is None else "failed"), verdict.note
        if self.watch is not None:
            self.journal.begin(item, "timing")
            record |= self.watch.measure(call)
            record["bound_seconds"] = bound_seconds(judge.case, record)
        return "passed", ""


def bound_seconds(case: Case, record: dict[str, Any]) -> float:
    preset, batch, precision = PRESETS[record["preset"]], record["batch"], record["precision"]
    return sum(roofline.bound(o.name, preset, batch, QUERIES, precision).seconds for o in case.operators)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--settings", type=setting, nargs="+", required=True, metavar="PRESET:BATCH")
    parser.add_argument("--kinds", nargs="+", choices=candidates.KINDS, required=True)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--data")
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="journals of an earlier verification")
    Worker(parser.parse_args(arguments)).run()


if __name__ == "__main__":
    main()
