"""What stands here needs the CUDA kernels compiled for the host; each test starts a process of its own."""

import pytest


@pytest.fixture(autouse=True)
def only_with_simt(request):
    if request.config.getoption("--kernels") != "simt":
        pytest.skip("needs --kernels=simt")
