"""Settings every test shares, and the axes tests are run along: ``backend``, ``dtype``, ``operation``."""

import pytest
import torch
from hypothesis import settings
from oracle import OPERATIONS, runs_on_cpu
from torch.distributions import Distribution

from fastkm._runtime import dispatch, schema

settings.register_profile("fastkm", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("fastkm")

DTYPES = (torch.float32, torch.float64)
TAKEN_OVER = pytest.StashKey[torch.library.Library]()
KERNELS = ("simt", "interpreter", "ttsem", "aot", "gpu")


def pytest_addoption(parser):
    parser.addoption("--kernels", choices=KERNELS, help="what runs the tests of the GPU kernels; see gpu/conftest.py")
    parser.addoption("--cpu-kernels", help="COMPILER:LEVEL, whose kernels run the tests; see compilers/operators.py")


def pytest_configure(config):
    if not (asked := config.getoption("--cpu-kernels")):
        return
    from compilers import build, operators

    try:
        taken = build.parse(asked)
        if not hasattr(config, "workerinput"):  # the processes of pytest-xdist share what the first one built
            build.compile_program(taken)
        program = operators.Program(build.command_to_run(taken))
    except (ValueError, build.Missing) as error:
        raise pytest.UsageError(f"--cpu-kernels: {error}") from None
    config.stash[TAKEN_OVER] = operators.take_over(program)
    config.add_cleanup(program.close)


def backend_param(*values):
    """A parameter set that ends in a backend, skipped while that backend cannot run here."""
    missing = values[-1] == "native" and schema.unavailable is not None
    marks = [pytest.mark.skip(reason=schema.unavailable)] if missing else []
    return pytest.param(*values, marks=marks, id="-".join(values))


def pytest_generate_tests(metafunc):
    own = {name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[0]}
    own |= {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize") if isinstance(mark.args[0], str)}
    names = set(metafunc.fixturenames) - own  # what a test does not parametrise itself
    if "operation" in names and "backend" in names:
        pairs = [(o, b) for o in OPERATIONS for b in ("reference", "native") if runs_on_cpu(o, b)]
        metafunc.parametrize(("operation", "backend"), [backend_param(*pair) for pair in pairs])
    elif "backend" in names:
        metafunc.parametrize("backend", [backend_param("reference"), backend_param("native")])
    if "dtype" in names:
        metafunc.parametrize("dtype", DTYPES, ids=["float32", "float64"])


@pytest.fixture(autouse=True)
def fixed_surroundings(monkeypatch):
    """No preset backend, one thread, a fixed seed."""
    monkeypatch.setattr(dispatch, "CHOSEN", None)
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def nothing_compiled_yet(monkeypatch):
    """Dynamo has no graphs, and distributions go on validating, which the first torch.compile turns off for good."""
    monkeypatch.setattr(Distribution, "_validate_args", Distribution._validate_args)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
