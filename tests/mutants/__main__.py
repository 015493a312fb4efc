"""Plants the faults one by one and says which the tests catch.

A fault first meets the tests it names. Those that no such test catches are planted all at once, and the whole suite
runs on them once; what fails there then runs on each of them alone. A result is kept, and used again until the code
that it is about changes: for a fault that was caught its file and its tests, for one that was not anything at all.
"""

import argparse
import functools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from mutants.catalogue import FAULTS
from mutants.fault import PLACES, ROOT, Fault, find, overlapping
from mutants.trees import BUILD, LIBRARY, Tree, digest, tracked

RESULTS = BUILD / "results.json"
MOST_SURVIVORS = 2
# What runs everything, for each place a fault can stand in: options and folders of pytest.
WHOLE: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "python": [((), ("tests",))],
    "cpu": [((), ("tests",))],
    "cuda": [(("--kernels=simt",), ("tests/gpu", "tests/simt"))],
    "triton": [(("--kernels=interpreter",), ("tests/gpu",)), (("--kernels=ttsem",), ("tests/gpu",))],
}


# ---- results that still hold ---------------------------------------------------------------------------------------


class Results:
    """What earlier runs found, by fault."""

    def __init__(self) -> None:
        self.kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self.everything = digest(tracked())
        self.keys = {fault.id: self.keys_of(fault) for fault in FAULTS}  # now: the tree may change during a run

    def keys_of(self, fault: Fault) -> tuple[str, str]:
        """They change when the result may be another: of a fault that its tests caught, and of any other."""
        about = repr(fault._replace(what="", survives=""))
        files = {find(fault).path.relative_to(ROOT), *(Path(test.partition("::")[0]) for test in fault.tests)}
        return f"{about} {digest(sorted(files))}", f"{about} {self.everything}"

    def get(self, fault: Fault) -> dict | None:
        kept = self.kept.get(fault.id)
        return kept if kept and kept["key"] in self.keys[fault.id] else None

    def put(self, fault: Fault, caught_by: str, seconds: float, named: bool = True) -> None:
        by_its_tests, by_others = self.keys[fault.id]
        key = by_its_tests if caught_by and named else by_others
        self.kept[fault.id] = {"caught_by": caught_by, "seconds": round(seconds, 1), "key": key}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        partial = RESULTS.with_suffix(".partial")
        partial.write_text(json.dumps(self.kept, indent=1) + "\n")
        partial.replace(RESULTS)


# ---- runs ----------------------------------------------------------------------------------------------------------


def prepare(faults: list[Fault], jobs: int) -> dict[str, list[Tree]]:
    """A tree with switches for the compiled faults of each kind, and one a worker for the others."""
    trees: dict[str, list[Tree]] = {}
    for place in ("cpu", "cuda"):
        if any(fault.place == place for fault in faults):
            say(f"building the kernels with a switch for every fault in {place}")
            tree = Tree(place)
            tree.plant_switches([fault for fault in FAULTS if fault.place == place])
            if place == "cpu":
                tree.build_library()
            else:
                tree.take_library()
            trees[place] = [tree]
    if any(not fault.compiled for fault in faults):
        workers = [Tree(f"python{i}") for i in range(jobs)]
        for tree in workers:
            tree.take_library()
        trees["python"] = trees["triton"] = workers
    return trees


def check_unchanged(faults: list[Fault], trees: dict[str, list[Tree]], red: bool) -> None:
    """The named tests pass without a fault, else a failure says nothing; if ``red``, those that fail are left out."""
    for options in sorted({fault.options for fault in faults}):
        for place in sorted({fault.place for fault in faults if fault.options == options}):
            tests = sorted({test for fault in faults if fault.place == place for test in fault.tests})
            outcome = trees[place][0].test([*options, *tests], first=False)
            if not outcome.passed:
                say(f"without a fault ({place}) these tests fail already: {', '.join(outcome.failed)}")
                if not red:
                    raise SystemExit(1)
                for tree in trees[place]:
                    tree.left_out += outcome.failed
            say(f"without a fault the other named tests of {place} pass, in {outcome.seconds:.0f} s")


def run_named(faults: list[Fault], trees: dict[str, list[Tree]], results: Results, jobs: int) -> None:
    """Each fault alone against the tests it names."""
    free: SimpleQueue[int] = SimpleQueue()
    for i in range(jobs):
        free.put(i)

    def one(fault: Fault) -> None:
        i = free.get()
        try:
            of_place = trees[fault.place]
            outcome = of_place[i % len(of_place)].test([*fault.options, *fault.tests], [fault])
        finally:
            free.put(i)
        by = "" if outcome.passed else outcome.failed[0]
        results.put(fault, by, outcome.seconds)
        say(f"{fault.id}: {'caught by ' + by if by else 'SURVIVES its tests'} ({outcome.seconds:.0f} s)")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, faults))


def run_whole(survivors: list[Fault], trees: dict[str, list[Tree]], results: Results) -> None:
    """All that is left at once against the whole suite, and each alone against what fails there."""
    for place in PLACES:
        left = [fault for fault in survivors if fault.place == place]
        for options, folders in WHOLE[place] if left else ():
            say(f"the whole suite {' '.join(options)} on {', '.join(fault.id for fault in left)} at once")
            tree = trees[place][0]
            suspects = find_suspects(tree, left, options, folders)
            for fault in left:
                outcome = tree.test([*options, *suspects], [fault]) if suspects else None
                if outcome and not outcome.passed:
                    results.put(fault, outcome.failed[0], outcome.seconds, named=False)
                    say(f"{fault.id}: caught by {outcome.failed[0]}")
            left = [fault for fault in left if not results.get(fault)["caught_by"]]
            if not left:
                break


def find_suspects(tree: Tree, faults: list[Fault], options: tuple[str, ...], folders: tuple[str, ...]) -> list[str]:
    """The tests that fail with all these faults and pass without one; all tests, where a crash hides which they are."""
    together = tree.test([*options, *folders], faults, first=False)
    if not all("::" in test for test in together.failed):
        return list(folders)
    unfit = tree.test([*options, *together.failed], first=False).failed if together.failed else ()
    if unfit:
        say(f"fails without a fault too: {', '.join(unfit)}")
    return [test for test in together.failed if test not in unfit]


# ---- the report ----------------------------------------------------------------------------------------------------


def page(faults: list[Fault], results: Results) -> str:
    """The page of results that the documentation shows."""
    found = {fault: results.get(fault) for fault in faults}
    caught = sum(bool(x and x["caught_by"]) for x in found.values())
    lines = [
        "# Planted faults",
        "",
        f"Printed by `make mutants`: {caught} of {len(faults)} planted faults are caught.",
        "How it is done: [planted faults](../development/planted-faults.md).",
        "",
        "| fault | what it is | where | caught by | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for fault, result in found.items():
        where = find(fault).path.relative_to(ROOT)
        by = "not run" if result is None else f"`{result['caught_by']}`" if result["caught_by"] else "**survives**"
        seconds = "" if result is None else f"{result['seconds']:.0f}"
        lines.append(f"| {fault.id} | {fault.what} | `{where}` | {by.replace('|', chr(92) + '|')} | {seconds} |")
    survivors = [fault for fault, result in found.items() if result and not result["caught_by"]]
    if survivors:
        lines += ["", "Survivors:", ""]
        lines += [f"* {fault.id}: {fault.survives or 'not explained'}" for fault in survivors]
    return "\n".join(lines) + "\n"


def say(words: str) -> None:
    print(words, flush=True)


def check() -> list[str]:
    """What is wrong with the list itself: quick, and without planting anything."""
    wrong = []
    ids = [fault.id for fault in FAULTS]
    wrong += [f"{name} stands twice in the list" for name in set(ids) if ids.count(name) > 1]
    wrong += ["two faults have one number"] * (len({fault.number for fault in FAULTS}) < len(FAULTS))
    read = functools.cache(Path.read_text)
    for fault in FAULTS:
        try:
            find(fault, read)
        except ValueError as error:
            wrong.append(str(error))
        for test in fault.tests:
            path, _, name = test.partition("::")
            text = (ROOT / path).read_text() if (ROOT / path).is_file() else None
            if text is None or (name and f"def {name}(" not in text):
                wrong.append(f"{fault.id}: there is no {test}")
    if not wrong:
        for place in ("cpu", "cuda"):
            pairs = overlapping([fault for fault in FAULTS if fault.place == place])
            wrong += [f"{pair} want the same code" for pair in pairs]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check that every fault still has its place")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these faults")
    parser.add_argument("--place", nargs="+", choices=PLACES, help="the faults of these places")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--named", action="store_true", help="leave the whole suite out for what its tests let live")
    parser.add_argument("--again", action="store_true", help="do not use results of earlier runs")
    parser.add_argument("--red", action="store_true", help="go on where tests fail without a fault, and leave them out")
    parser.add_argument("--output", type=Path, default=BUILD / "planted-faults.md", help="where the page goes")
    options = parser.parse_args()
    if wrong := check():
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if options.check:
        print(f"{len(FAULTS)} faults, each with its place")
        return 0
    unknown = set(options.only or ()) - {fault.id for fault in FAULTS}
    if unknown:
        parser.error(f"there is no fault {', '.join(sorted(unknown))}")
    chosen = [f for f in FAULTS if f.id in (options.only or [f.id]) and f.place in (options.place or PLACES)]
    results = Results()
    new = [fault for fault in chosen if options.again or results.get(fault) is None]
    if not (ROOT / LIBRARY).exists():
        parser.error("the kernels are not built; run make setup")
    if new:
        trees = prepare(new, options.jobs)
        check_unchanged(new, trees, options.red)
        run_named(new, trees, results, options.jobs)
        if not options.named:
            run_whole([fault for fault in new if not results.get(fault)["caught_by"]], trees, results)
    text = page(chosen, results)
    options.output.write_text(text)
    print(text)
    alive = [fault for fault in chosen if not (results.get(fault) or {}).get("caught_by")]
    return int(len(alive) > MOST_SURVIVORS or any(not fault.survives for fault in alive))


if __name__ == "__main__":
    sys.exit(main())
