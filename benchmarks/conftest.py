"""pytest-benchmark over the candidates of the full benchmark: what fails its check is not timed.

pytest benchmarks --benchmark-only --presets S LLM --benchmark-json=results/pytest.json
"""

from functools import cache

import pytest
import torch
from suite import ITERS, Case, Group, candidates

from fastkm.testing.presets import PRESETS

COMPILE_LIMIT = 120  # seconds; nothing is compiled here


def case(operation: str, preset: str, batch: int) -> Case:
    return Case(operation, PRESETS[preset], batch)


@cache
def group(operation: str, preset: str, batch: int) -> Group:
    return Group(case(operation, preset, batch), {}, COMPILE_LIMIT)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--presets", nargs="+", choices=PRESETS, default=["S", "M", "L"], help="shapes to time")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's OPERATIONS and BATCHES against every preset and candidate."""
    cases = [
        pytest.param(operation, preset, batch, name, id=f"{operation}-{preset}-B{batch}-{name.replace(' ', '-')}")
        for operation in metafunc.module.OPERATIONS
        for preset in metafunc.config.getoption("presets")
        for batch in metafunc.module.BATCHES
        for name in candidates(case(operation, preset, batch))
    ]
    metafunc.parametrize(("operation", "preset", "batch", "name"), cases)


@pytest.fixture
def measure(benchmark):
    """Hand a verified candidate to pytest-benchmark with all that makes its figure readable."""

    def run(operation: str, preset: str, batch: int, name: str) -> None:
        verified = group(operation, preset, batch)
        record = verified.records[name]
        if record["status"] == "left out":
            pytest.skip(record["note"])
        assert record["status"] == "timed", f"not timed: {record['note']}"
        benchmark.group = f"{operation} {preset} B={batch}"
        benchmark.extra_info.update(PRESETS[preset]._asdict(), B=batch, Q=verified.case.queries, n=ITERS)
        benchmark.extra_info.update(error=record.get("error"), threads=torch.get_num_threads())
        benchmark.extra_info.update(units=verified.units, unit=verified.unit)
        benchmark(verified.ready[name])

    return run
