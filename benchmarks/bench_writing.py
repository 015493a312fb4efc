import pytest

OPERATIONS = ("write",)
BATCHES = (1, 16)


@pytest.mark.benchmark(max_time=0.3)
def bench(measure, operation, preset, batch, name):
    measure(operation, preset, batch, name)
