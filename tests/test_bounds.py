"""The CPU kernels touch nothing beyond the caller's memory, in whose own rows they work."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fastkm._runtime import schema

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
LEVELS = ("base", "avx2", "avx512")

pytestmark = [
    pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable)),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
]


@pytest.fixture(scope="module")
def highest():
    import torch

    return torch.ops.fastkm.select_cpu_level(len(LEVELS) - 1)


@pytest.fixture(scope="module", params=LEVELS)
def program(request, highest, tmp_path_factory):
    if LEVELS.index(request.param) > highest:
        pytest.skip(f"this processor has no {request.param}")
    binary = tmp_path_factory.mktemp("bounds") / request.param
    source = CSRC / "cpu" / "levels" / f"{request.param}.cpp"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover"]
    defines = [f'-DFASTKM_LEVEL_SOURCE="{source}"', f"-DFASTKM_LEVEL_NAME={request.param}"]
    options = ["-std=c++20", "-O1", "-g1", "-w", "-ffp-contract=fast", f"-I{CSRC}"]
    subprocess.run(["g++", *options, *sanitizers, *defines, HERE / "bounds.cpp", "-o", binary], check=True)
    return binary


def test_kernels_stay_within_the_callers_memory(program):
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "within bounds\n"


def test_codes_that_end_early_are_noticed(program):
    done = subprocess.run([program, "short"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
