"""The serving benchmark's own logic: mixes, percentiles, rates, the check before anything is timed, and the picture."""

import json
import math

import pytest

pytest.importorskip("benchmarks", reason="needs the source tree")

from benchmarks import serving
from benchmarks.sweep.grid import Cell
from benchmarks.sweep.measure import make_inputs
from fastkm.testing.extras import UserError


class Counted:
    def __init__(self):
        self.calls = ""

    def read(self, query):
        self.calls += "r"

    def write(self, pattern):
        self.calls += "w"


@pytest.mark.parametrize("mix", serving.MIXES)
def test_a_write_follows_so_many_reads(mix):
    server = Counted()
    found = serving.serve("counted", server, mix, [None], [None], 0.01)
    assert (server.calls.count("r"), server.calls.count("w")) == (len(found.reads), len(found.writes))
    assert server.calls.rstrip("r").split("w")[:-1] == ["r" * mix] * len(found.writes)
    assert found.seconds >= 0.01


def test_percentiles_are_times_of_calls():
    calls = [(0.0, x) for x in (4.0, 1.0, 3.0, 2.0)]
    assert [serving.percentile(calls, share) for share in (0.5, 0.75, 0.99)] == [2.0, 3.0, 4.0]
    assert math.isnan(serving.percentile([], 0.5))


def test_rates_count_every_read_once():
    service = serving.Service("a", 0, [(ended, 0.1) for ended in (0.1, 0.2, 0.9, 2.0)], [], 2.0)
    assert serving.rates(service, 2) == [3.0, 1.0]  # three reads in the first second, one in the second


def told(server, mix):
    reads = [(0.01 * (i + 1), 1e-3 * (1 + i % 7)) for i in range(200)]
    writes = [(0.1 * (i + 1), 5e-3) for i in range(20)] if mix else []
    return serving.summary(serving.Service(server, mix, reads, writes, 2.0))


def test_a_row_of_the_service():
    row = dict(zip(serving.SERVICE, serving.service_row(told("functions", 0)), strict=True))
    assert (row["queries / s"], row["read p50 ms"], row["read p99 ms"], row["write p50 ms"]) == ("100", "4", "7", "–")
    assert serving.service_row(told("functions", 10))[-2:] == ("5", "5")


@pytest.mark.parametrize(("share", "gap", "verdict"), [(0.04, 0.0, "met"), (0.06, 0.0, "MISSED"), (0.01, 0.2, "void")])
def test_a_claim_is_met_missed_or_void(share, gap, verdict):
    record = {"call": "read_factored", "seconds": 1e-4, "gap": gap, "of": "read", "share": share, "at_most": 0.05}
    assert serving.call_row(record)[-1] == verdict


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="in the bench extra")
    services = [told(server, mix) for server in serving.SERVERS for mix in serving.MIXES]
    file = tmp_path / "serving.png"
    serving.draw(services, {"threads": 1, "processor": "a processor"}, 2.0, str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_server_is_not_timed(monkeypatch):
    class Wrong(serving.Functions):
        def read(self, query):
            return super().read(query) + 1e-2

    e = make_inputs(Cell("read", 8, 6, 4, 1))
    queries, patterns = e.queries.split(1, 1), e.queries.split(1, 1)
    monkeypatch.setattr(serving, "SERVERS", {"functions": serving.Functions})
    assert max(serving.check(e.prior, queries, patterns).values()) < 1e-5
    monkeypatch.setattr(serving, "SERVERS", {"functions": serving.Functions, "wrong": Wrong})
    with pytest.raises(UserError, match="'wrong'"):
        serving.check(e.prior, queries, patterns)


def test_a_run_writes_everything(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="in the bench extra")
    for name, value in {"ROWS": 12, "CODE": 8, "POOL": 32}.items():
        monkeypatch.setattr(serving, name, value)
    monkeypatch.setattr(serving, "pin", lambda threads: "not pinned: a test")
    monkeypatch.setattr(serving, "keep_freed_memory", lambda: "not kept: a test")
    assert serving.main(["--seconds", "0.01", "--output", str(tmp_path)]) in (0, 1)  # timing decides no test
    data = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))
    assert set(data["errors"]) == set(serving.SERVERS)
    assert len(data["services"]) == len(serving.SERVERS) * len(serving.MIXES)
    assert all((tmp_path / name).exists() for name in serving.RESULTS)
