"""pytest-benchmark over the candidates of the full benchmark: what fails its check is not timed.

pytest benchmarks --benchmark-only --presets S LLM --benchmark-json=results/pytest.json
"""

from functools import cache

import pytest
import torch

from benchmarks.cases import ITERS, Group, Setting, candidates
from fastkm.testing.operations import KERNEL_OPERATIONS, Case
from fastkm.testing.presets import PRESETS

COMPILE_LIMIT = 120  # seconds; nothing is compiled here


@cache
def group(setting: Setting) -> Group:
    return Group(setting, {}, COMPILE_LIMIT)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--presets", nargs="+", choices=PRESETS, default=["S", "M", "L"], help="shapes to time")
    parser.addoption("--batch", nargs="+", type=int, default=[1, 16], help="memories")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every operation with a kernel against every preset, batch and candidate."""
    settings = [
        Setting(Case(operation), PRESETS[preset], batch)
        for operation in KERNEL_OPERATIONS
        for preset in metafunc.config.getoption("presets")
        for batch in metafunc.config.getoption("batch")
    ]
    cases = [
        pytest.param(s, name, id=f"{s.case}-{s.preset.name}-B{s.batch}-{name.replace(' ', '-')}")
        for s in settings
        for name in candidates(s)
    ]
    metafunc.parametrize(("setting", "name"), cases)


@pytest.fixture
def measure(benchmark):
    """Hand a verified candidate to pytest-benchmark with all that makes its figure readable."""

    def run(setting: Setting, name: str) -> None:
        verified = group(setting)
        record = verified.records[name]
        if record["status"] == "left out":
            pytest.skip(record["note"])
        assert record["status"] == "timed", f"not timed: {record['note']}"
        benchmark.group = f"{setting.case} {setting.preset.name} B={setting.batch}"
        benchmark.extra_info.update(setting.preset._asdict(), B=setting.batch, Q=setting.queries, n=ITERS)
        benchmark.extra_info.update(error=record.get("error"), threads=torch.get_num_threads())
        benchmark.extra_info.update(units=verified.units, unit=verified.unit)
        benchmark(verified.ready[name])

    return run
