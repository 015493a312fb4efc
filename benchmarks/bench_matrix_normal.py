import pytest

OPERATIONS = ("kl_memory", "logdet")
BATCHES = (16,)


@pytest.mark.benchmark(max_time=0.3)
def bench(measure, operation, preset, batch, name):
    measure(operation, preset, batch, name)
