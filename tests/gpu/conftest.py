"""What runs the GPU kernels in these tests: ``--kernels`` names one of the rungs, each in a process of its own.

==============  =====================================================================================
simt            the CUDA kernels compiled for the host, one fiber per CUDA thread (``tests/simt``)
interpreter     the Triton kernels in Triton's interpreter, with the corrections of ``interpreter.py``
ttsem           the IR that Triton's frontend makes of them, executed by ttsem: bounds, races, values
aot             nothing runs: every Triton kernel is compiled for GPUs that are absent (``test_aot.py``)
gpu             both backends on a real device
==============  =====================================================================================

Without the option the tests are skipped. Tensors that a kernel is to fill hold NaN before.
"""

import os

import pytest
import torch
from torch.utils import deterministic

from fastkm._runtime import dispatch
from fastkm._runtime.dispatch import FLOAT32, Capability
from gpu.support import Kernels

BACKENDS = {"simt": ("native",), "interpreter": ("triton",), "ttsem": ("triton",), "gpu": ("native", "triton")}


def pytest_configure(config):
    if config.getoption("--kernels") == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before that
        from gpu.interpreter import correct

        correct()


def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("--kernels")
    for item in items:
        if "kernels" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
            if chosen in (None, "aot"):
                item.add_marker(pytest.mark.skip(reason="needs --kernels=simt, interpreter, ttsem or gpu"))


def pytest_generate_tests(metafunc):
    if "kernels" in metafunc.fixturenames:
        metafunc.parametrize("kernels", BACKENDS.get(metafunc.config.getoption("--kernels"), ("none",)), indirect=True)


@pytest.fixture(scope="session")
def cuda_on_the_host():
    """``torch.ops.fastkm`` runs CUDA kernels on the CPU, as long as the returned library lives."""
    from simt.build import install

    return install()


@pytest.fixture
def kernels(request, monkeypatch):
    rung, backend = request.config.getoption("--kernels"), request.param
    device = "cuda" if rung == "gpu" else "cpu"
    if device == "cpu":
        for operation, table in dispatch.CAPABILITIES.items():
            if backend in table:
                monkeypatch.setitem(dispatch.CAPABILITIES[operation], backend, Capability({device: FLOAT32}))
    if rung == "simt":
        request.getfixturevalue("cuda_on_the_host")
        monkeypatch.setattr(dispatch, "reads_low_precision", lambda *where: True)
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if rung == "ttsem":
            from ttsem import sanitize

            from gpu import semantics

            semantics.install(monkeypatch)
            with sanitize.session(cuda_is_cpu=False) as session:
                yield Kernels(backend, device)
            assert not session.races_unchecked
        else:
            yield Kernels(backend, device)
    finally:
        torch.use_deterministic_algorithms(False)
