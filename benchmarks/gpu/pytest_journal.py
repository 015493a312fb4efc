"""A pytest plugin: each test is an item of a journal, and several processes share the tests.

pytest -p benchmarks.gpu.pytest_journal --journal FILE --shard 0/8 tests/gpu --kernels=gpu
"""

import os
from pathlib import Path

import pytest

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.probe import device_is_lost
from benchmarks.gpu.runner import LOST

LAST_LINES = 12  # of a failure's own words


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", required=True)
    parser.addoption("--shard", default="0/1", help="which part of the tests this process runs")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Notes(Journal(Path(config.getoption("--journal")))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, shards = map(int, config.getoption("--shard").split("/"))
    done = Journal(Path(config.getoption("--journal"))).read().ended
    items[:] = [item for item in items[shard::shards] if item.nodeid not in done]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = 0  # the journal tells the outcomes


class Notes:
    def __init__(self, journal: Journal):
        self.journal = journal
        self.outcome, self.told, self.seconds = "passed", "", 0.0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.journal.begin(nodeid)
        self.outcome, self.told, self.seconds = "passed", "", 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.skipped and self.outcome == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.outcome, self.told = "skipped", reason.removeprefix("Skipped: ")
        elif report.failed:
            self.outcome, self.told = "failed", "\n".join(report.longreprtext.splitlines()[-LAST_LINES:])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.journal.end(nodeid, self.outcome, self.told, seconds=round(self.seconds, 3))
        if self.outcome == "failed" and device_is_lost():
            os._exit(LOST)
