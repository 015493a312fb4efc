import pytest

OPERATIONS = ("read",)
BATCHES = (1, 16, 64)


@pytest.mark.benchmark(max_time=0.3)
def bench(measure, operation, preset, batch, name):
    measure(operation, preset, batch, name)
