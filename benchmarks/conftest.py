"""pytest-benchmark over the episodes of ``python -m fastkm bench``: what fails its check is not timed.

pytest benchmarks --benchmark-only --presets S LLM --benchmark-json=results/pytest.json
"""

from functools import cache

import pytest
import torch

from fastkm import _backend
from fastkm.cli.bench import LOOP
from fastkm.cli.episodes import Episode, build_episode
from fastkm.cli.images import load_images
from fastkm.cli.measure import own_error, verify
from fastkm.cli.operations import OPERATIONS, units
from fastkm.cli.presets import PRESETS

QUERIES, ITERS = 32, 10
images = cache(load_images)


@cache
def episode(preset: str, batch: int) -> Episode:
    return build_episode(images(), PRESETS[preset], batch, QUERIES, ITERS).to(torch.float32)


@cache
def verdicts(operation: str, preset: str, batch: int):
    return verify(operation, episode(preset, batch))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--presets", nargs="+", choices=PRESETS, default=["S", "M", "L"], help="shapes to time")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's OPERATIONS and BATCHES against every preset and backend, and the literal loop where there is one."""
    cases = [
        pytest.param(operation, preset, batch, backend, id=f"{operation}-{preset}-B{batch}-{backend.replace(' ', '-')}")
        for operation in metafunc.module.OPERATIONS
        for preset in metafunc.config.getoption("presets")
        for batch in metafunc.module.BATCHES
        for backend in (*_backend.CAPABILITIES[operation], *([LOOP] if OPERATIONS[operation].loop else []))
    ]
    metafunc.parametrize(("operation", "preset", "batch", "backend"), cases)


@pytest.fixture
def measure(benchmark):
    """Verify a backend, then hand it to pytest-benchmark with all that makes its figure readable."""

    def run(operation: str, preset: str, batch: int, backend: str) -> None:
        inputs, op = episode(preset, batch), OPERATIONS[operation]
        verdict = own_error(operation, inputs) if backend == LOOP else verdicts(operation, preset, batch)[backend]
        if verdict.ok is None:
            pytest.skip(verdict.note)
        assert verdict.ok, f"not timed: {verdict.note}, error {verdict.error:.1e}, allowed {verdict.allowed:.1e}"
        shapes = {**PRESETS[preset]._asdict(), "B": batch, "Q": QUERIES, "n": ITERS}
        benchmark.group = f"{operation} {preset} B={batch}"
        benchmark.extra_info.update(shapes, error=verdict.error, threads=torch.get_num_threads())
        benchmark.extra_info.update(units=units(op, inputs), unit=op.unit)
        benchmark(op.loop, inputs) if backend == LOOP else benchmark(op.run, inputs, backend)

    return run
