"""``python -m fuzz``: see the package. A run is resumed with ``--first``: problems are drawn by seed and number."""

import argparse
import time
from collections import Counter

import torch

from fuzz.judge import FAULTS, OUTCOMES, judge
from fuzz.problems import draw

PER_DRAW = 16  # problems that are computed together


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, help="how long")
    parser.add_argument("--problems", type=int, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the draw to begin with (default: %(default)s)")
    parser.add_argument("--show", type=int, default=10, help="faults that are printed (default: %(default)s)")
    parser.add_argument("--no-gradients", action="store_true")
    options = parser.parse_args(arguments)
    if options.seconds is None and options.problems is None:
        parser.error("say --seconds or --problems")
    torch.set_num_threads(1)
    begin, done, number, faults = time.monotonic(), 0, options.first, []
    counts: dict[str, Counter] = {}
    while True:
        spent = options.seconds is not None and time.monotonic() - begin > options.seconds
        if spent or (options.problems is not None and done >= options.problems):
            break
        problems = draw(options.seed, number, PER_DRAW)
        verdicts = judge(problems, options.seed, not options.no_gradients)
        key = f"{problems.operation}, {'wide' if problems.wide else 'ordinary'}"
        counts.setdefault(key, Counter()).update(v.outcome for v in verdicts)
        faults += [v for v in verdicts if v.outcome in FAULTS]
        done, number = done + len(verdicts), number + 1
    for v in sorted(faults, key=lambda v: -v.worst)[: options.show]:
        print(f"{v.outcome} {v.worst:.3g}x  {v.problem}\n    {v.detail}")
    show(counts)
    print(f"{done} problems, seed {options.seed}, draws {options.first} to {number - 1}, {len(faults)} faults")
    return 1 if faults else 0


def show(counts: dict[str, Counter]) -> None:
    keys = sorted(counts)
    for outcome in OUTCOMES:
        row = [counts[key][outcome] for key in keys]
        if any(row):
            print(
                f"{outcome:<34} {sum(row):>7}   "
                + ", ".join(f"{key}: {n}" for key, n in zip(keys, row, strict=True) if n)
            )


if __name__ == "__main__":
    raise SystemExit(main())
