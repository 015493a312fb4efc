"""Every candidate of the full benchmark under pytest-benchmark; conftest.py says how to run it and makes the cases."""

import pytest


@pytest.mark.benchmark(max_time=0.3)
def bench(measure, setting, name):
    measure(setting, name)
