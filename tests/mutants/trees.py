"""Copies of the tree under build/mutants in which faults are planted; the tree itself is never changed."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mutants.fault import ROOT, Fault, find, switched_sources

BUILD = ROOT / "build" / "mutants"
LIBRARY = Path("fastkm") / "_C.abi3.so"
SECONDS = 1800  # that the tests of one fault may take before they count as hanging


def tracked(root: Path = ROOT) -> list[Path]:
    """Files of the tree, those not yet committed too, without this folder: its check would notice every fault."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    own = Path(__file__).parent.relative_to(root)
    paths = (Path(name) for name in listed.split("\0") if name)
    return sorted(path for path in paths if (root / path).is_file() and not path.is_relative_to(own))


def digest(paths: Iterable[Path], root: Path = ROOT) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(str(path).encode() + b"\0" + (root / path).read_bytes() + b"\0")
    return found.hexdigest()[:16]


COMPILER = Path("build_support/compiler.py")


def little_optimised() -> str:
    """The flags of the build, with less optimisation: the kernels are compiled once and run a few tests a fault."""
    text = (ROOT / COMPILER).read_text()
    assert text.count('"-O3"') == 1, f"{COMPILER} no longer names the optimisation as this expects"
    return text.replace('"-O3"', '"-O1"')


class Outcome(NamedTuple):
    """What a run of pytest said."""

    passed: bool
    failed: tuple[str, ...]  # the tests that failed, or what else happened
    seconds: float


class Tree:
    """A copy of the tree."""

    def __init__(self, name: str) -> None:
        self.path = BUILD / "trees" / name
        self.left_out: tuple[str, ...] = ()  # tests that fail without a fault
        self.path.mkdir(parents=True, exist_ok=True)
        wanted = tracked()
        present = {p.relative_to(self.path) for p in self.path.rglob("*") if p.is_file()}
        for path in wanted:
            self.write(path, (ROOT / path).read_bytes())
        for path in present - set(wanted):
            if path.suffix not in (".so", ".o", ".d", ".ninja") and path.parts[0] != "build":
                (self.path / path).unlink()

    def write(self, path: Path, content: bytes) -> None:
        """Only what differs is written, so that a build does again only what it must."""
        to = self.path / path
        if not to.exists() or to.read_bytes() != content:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(content)

    def take_library(self) -> None:
        """The compiled kernels of the tree itself."""
        if (ROOT / LIBRARY).exists():
            self.write(LIBRARY, (ROOT / LIBRARY).read_bytes())

    @contextmanager
    def planted(self, faults: Iterable[Fault]) -> Iterator[None]:
        """With these faults in the source; compiled ones are there already, and switched on for a run."""
        before: dict[Path, str] = {}
        try:
            for fault in faults:
                if not fault.compiled:
                    path, start, end = find(fault, root=self.path)
                    text = path.read_text()
                    before.setdefault(path, text)
                    path.write_text(text[:start] + fault.after + text[end:])
            yield
        finally:
            for path, text in before.items():
                path.write_text(text)

    def plant_switches(self, faults: list[Fault]) -> None:
        """Every compiled fault behind a switch, so that one build serves them all."""
        for path, text in switched_sources(faults).items():
            self.write(path.relative_to(ROOT), text.encode())

    def build_library(self) -> None:
        """With little optimisation and without CUDA: it is built once and runs a few tests a fault."""
        self.write(COMPILER, little_optimised().encode())
        environment = os.environ | {
            "FASTKM_CUDA": "0",
            "MAX_JOBS": os.environ.get("MAX_JOBS", "2"),
            "CPATH": str(self.path / "csrc"),
        }
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the kernels with switches do not compile:\n{done.stdout[-3000:]}{done.stderr[-6000:]}")

    def test(self, arguments: Iterable[str], faults: Iterable[Fault] = (), first: bool = True) -> Outcome:
        """Run pytest with these faults planted, up to the first failure or to the end."""
        with self.planted(faults):
            return self.run(arguments, [fault for fault in faults if fault.compiled], first)

    def run(self, arguments: Iterable[str], on: list[Fault], first: bool) -> Outcome:
        environment = os.environ | {
            "PYTHONPATH": str(self.path),
            "PYTHONDONTWRITEBYTECODE": "1",  # a stale cache would hide a fault of the same size
            "FASTKM_FAULTS": ",".join(str(fault.number) for fault in on),
        }
        options = ["-q", "-rfE", "--tb=no", "--no-header", "-p", "no:cacheprovider", *(["-x"] if first else [])]
        options += [f"--deselect={test}" for test in self.left_out]
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        begin = time.monotonic()
        with subprocess.Popen(
            command, cwd=self.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                said, _ = process.communicate(timeout=SECONDS if first else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return Outcome(False, (f"no end after {SECONDS} s",), time.monotonic() - begin)
        seconds = time.monotonic() - begin
        nothing_left = process.returncode == 5 and self.left_out
        if process.returncode == 0 or nothing_left:
            return Outcome(True, (), seconds)
        failed = tuple(re.findall(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - .*)?$", said, re.MULTILINE))
        if process.returncode < 0:
            where = re.search(r'File ".*?(tests/\S+?)", line \d+ in (test_\w+)', said)
            failed = (f"{where[1]}::{where[2]}" if where else "a crash",)
        elif process.returncode not in (1, 2) or not failed:
            raise SystemExit(f"pytest could not run {' '.join(command)}:\n{said[-4000:]}")
        return Outcome(False, failed, seconds)
