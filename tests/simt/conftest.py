"""These tests need the CUDA kernels compiled for the host. Each test starts a process of its own."""

import pytest


@pytest.fixture(autouse=True)
def only_with_simt(request):
    if request.config.getoption("--kernels") != "simt":
        pytest.skip("needs --kernels=simt")
