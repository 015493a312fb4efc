"""Commands and workers: processes that are watched, started again after a fault, and stopped when their time is up."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.journal import Journal, Line

ROOT = Path(__file__).resolve().parents[2]
PYTHON: tuple[str, ...] = (sys.executable,)  # what runs a module; a test puts a simulated device before it
LOST = 75  # exit status of a worker whose device answers no more: the next process goes on
RESTARTS = 10  # of one worker; each costs the start of a process
POLL = 0.2  # seconds
TAIL = 15  # lines of output that a report keeps


class Skip(Exception):
    """A step that cannot be done here, and why."""


class CutShort(Exception):
    """A step whose time was up, and how far it came."""


class Stopped(BaseException):
    """A signal asks the whole command to end. No step may take it for a failure of its own."""


def tail(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(text.strip().splitlines()[-TAIL:])


def module(name: str, *arguments: object) -> tuple[str, ...]:
    return (*PYTHON, "-m", name, *map(str, arguments))


class Process:
    """A command in a process group of its own, so that what it starts can be stopped with it."""

    def __init__(self, words: Sequence[str], log: Path, environment: dict[str, str]):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            self.running = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )

    def status(self) -> int | None:
        return self.running.poll()

    def stop(self) -> None:
        """At once: a process that waits for a kernel answers to no other signal."""
        if self.status() is None:
            os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait()


def run(words: Sequence[str], log: Path, environment: dict[str, str], time_left: Callable[[], float]) -> str:
    """The last lines of a command that has to succeed in time."""
    log.unlink(missing_ok=True)
    name = " ".join([Path(words[0]).name, *words[1:4]])
    process = Process(words, log, environment)
    try:
        while process.status() is None:
            if time_left() <= 0:
                raise CutShort(f"{name} was stopped:\n{tail(log)}")
            time.sleep(POLL)
    finally:
        process.stop()
    if process.status():
        raise RuntimeError(f"{name} ended with {process.status()}:\n{tail(log)}")
    return tail(log)


class Worker:
    """A process that does items one after another and notes each in a journal.

    An item that ends the process or is silent for ``patience`` seconds has failed, and a new process goes on after it.
    The command has to leave out the items that its journal holds. ``done`` are exit statuses of a process that has
    come to its end.
    """

    def __init__(
        self,
        words: Callable[[Journal], Sequence[str]],
        name: Path,
        environment: dict[str, str],
        patience: float,
        done: Sequence[int] = (0,),
    ):
        self.journal, self.log = Journal(name.with_suffix(".jsonl")), name.with_suffix(".log")
        for old in (self.journal.path, self.log):
            old.unlink(missing_ok=True)
        self.words, self.environment = words(self.journal), environment
        self.patience, self.done, self.restarts = patience, done, 0
        self._start()

    def _start(self) -> None:
        self.process = Process(self.words, self.log, self.environment)
        self.started, self.finished = time.time(), False

    def working(self) -> bool:
        """Whether there is more to come; a process that stopped or hangs is replaced."""
        if self.finished:
            return False
        status = self.process.status()
        if status is None and self._silent_for() < self.patience:
            return True
        self.finished = True
        if status in self.done:
            return False
        self.process.stop()
        why = f"nothing for {self.patience:.0f} s, stopped" if status is None else f"the process ended with {status}"
        if self._can_go_on(status, why):
            self.restarts += 1
            self._start()
        return not self.finished

    def _silent_for(self) -> float:
        noted = self.journal.path.stat().st_mtime if self.journal.path.exists() else 0
        return time.time() - max(noted, self.started)

    def _can_go_on(self, status: int | None, why: str) -> bool:
        entries = self.journal.read()
        if entries.open is not None:
            doing = f" at {entries.doing}" if entries.doing else ""
            self.journal.end(entries.open, "failed", f"{why}{doing}:\n{tail(self.log)}")
        elif status != LOST:
            self.journal.end(f"{self.log.stem}: start", "failed", f"{why} before any item:\n{tail(self.log)}")
            return False
        if self.restarts == RESTARTS:
            self.journal.end(f"{self.log.stem}: the rest", "failed", f"not run: {RESTARTS} items ended their process")
        return self.restarts < RESTARTS

    def stop(self) -> None:
        if not self.finished:
            self.process.stop()
        self.finished = True


def drive(workers: Sequence[Worker], time_left: Callable[[], float], tick: Callable[[], None]) -> bool:
    """Wait for all workers; False when their time was up before. ``tick`` is called now and then."""
    try:
        while any([worker.working() for worker in workers]):  # a list: each of them is looked after
            if time_left() <= 0:
                return False
            tick()
            time.sleep(POLL)
        return True
    finally:
        for worker in workers:
            worker.stop()


def lines_of(workers: Sequence[Worker]) -> list[Line]:
    return [line for worker in workers for line in worker.journal.read().ended.values()]
