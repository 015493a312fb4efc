"""The page that takes a toy operation through every file is true: its code runs in a copy of the sources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkm._runtime import schema

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "development" / "adding-a-kernel.md"
BLOCK = re.compile(
    r"^```\{code-block\} \w+\n:caption: (new file|add to) `([^\n`]+)`(?:, ([^\n]+))?\n\n(.*?)^```$", re.M | re.S
)

# What an addition is put in front of: the first match in its file, or the end of the file.
ANCHORS = {
    "fastkm/_runtime/schema.py": r"^# ---- backward",
    "in CAPABILITIES": r'^    "logdet": ',
    "before the table": r"^// The CPU kernels\. Each computes memories",
    "in Kernels": r"^  void \(\*logdet_backward\)",
    "in the table": r"^      \.logdet_backward = ",
    "in namespace cuda": r"^const char\* logdet_backward\(",
    "in ENTRIES": r'^    Operation\(\n        "logdet",',
}

pytestmark = [
    pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree"),
    pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable)),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources with every block of the page applied."""
    tree = tmp_path_factory.mktemp("toy")
    for folder in ("fastkm", "csrc", "tests/simt"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) == PAGE.read_text().count("```{code-block}")
    for kind, path, where, code in blocks:
        target = tree / path
        if kind == "new file":
            assert not target.exists(), path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(code)
        else:
            text = target.read_text()
            at = re.search(ANCHORS[where or path], text, re.MULTILINE)
            assert at, f"{path} has no place for the block {where}"
            target.write_text(f"{text[: at.start()]}{code.rstrip()}\n{text[at.start() :]}")
    level = tree / "csrc/cpu/levels/level.h"
    level.write_text(
        level.read_text().replace(
            '#include "cpu/posterior', '#include "cpu/norms/row_norms.h"\n#include "cpu/posterior', 1
        )
    )
    registry = tree / "fastkm/testing/operations.py"
    registry.write_text(
        registry.read_text().replace(
            "\nimport fastkm\n",
            "\nimport fastkm\nfrom fastkm.norms import reference as norms\nfrom fastkm.norms.api import row_norms\n",
            1,
        )
    )
    return tree


def compile_with(tree, *arguments):
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", f"-I{tree}/csrc", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The kernel and its binding alone, with a table in which the other kernels are missing.
EXTENSION = """
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#define FASTKM_LEVEL base
#define FASTKM_VECTOR_BYTES 16
#define FASTKM_TILE_ROWS 4
#include "cpu/norms/row_norms.h"

namespace fastkm {
template <class Real>
const Kernels<Real>& kernels() {
  static constexpr Kernels<Real> table{.row_norms = base::row_norms<Real>,
                                       .row_norms_backward = base::row_norms_backward<Real>};
  return table;
}
template const Kernels<float>& kernels();
template const Kernels<double>& kernels();
}  // namespace fastkm

#include "bindings/norms.cpp"
"""

CONFTEST = """
import pytest, torch
torch.ops.load_library("row_norms.so")
DTYPES = (torch.float32, torch.float64)

def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["reference", "native"])
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES)
"""

REGISTERED = """
import torch
torch.ops.load_library("row_norms.so")
from fastkm.testing.operations import OPERATIONS

assert OPERATIONS["row_norms"].operator.name == "row_norms"
"""

INTERPRETED = """
import torch
torch.ops.load_library("row_norms.so")
from fastkm._runtime import dispatch
from fastkm.norms.api import row_norms

dispatch.CAPABILITIES["row_norms"]["triton"] = dispatch.Capability({"cpu": (torch.float32,)})
mean = torch.randn(2, 37, 70, requires_grad=True)
norms = row_norms(mean, backend="triton")
torch.testing.assert_close(norms, mean.square().sum(-1))
g = torch.randn_like(norms)
torch.testing.assert_close(torch.autograd.grad(norms, mean, g)[0], 2 * g.unsqueeze(-1) * mean)
"""


@pytest.fixture(scope="module")
def built(tree):
    """The tree, with the toy's own extension beside it."""
    include = Path(torch.__file__).with_name("include")
    (tree / "extension.cpp").write_text(EXTENSION)
    libraries = [f"-L{include.with_name('lib')}", "-ltorch_cpu", "-lc10"]
    sources = ["-x", "c++", tree / "extension.cpp", tree / "csrc/cpu/linalg/arena.cpp"]
    flags = ["-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", include]
    compile_with(tree, *flags, *sources, *libraries, "-o", tree / "row_norms.so")
    return tree


def run(tree, *command, **environment):
    surroundings = os.environ | {"PYTHONPATH": str(tree)} | environment
    done = subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True, env=surroundings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_of_the_page_pass_on_the_reference_and_the_cpu_kernel(built):
    (built / "tests" / "conftest.py").write_text(CONFTEST)
    told = run(built, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=tests", "tests/test_norms.py")
    assert "passed" in told
    assert "skipped" not in told


def test_the_registry_takes_the_toy(built):
    (built / "registered.py").write_text(REGISTERED)
    run(built, "registered.py")


def test_the_triton_kernels_compute_it(built):
    pytest.importorskip("triton")
    (built / "interpreted.py").write_text(INTERPRETED)
    run(built, "interpreted.py", TRITON_INTERPRET="1")


def test_the_cuda_kernels_compile_for_the_host(tree):
    simt = ["-fsyntax-only", "-DFASTKM_SIMT", f"-I{tree}/tests/simt", "-x", "c++"]
    compile_with(tree, *simt, tree / "csrc/cuda/norms/row_norms.cu")


def test_the_table_of_a_level_takes_the_kernel(tree):
    compile_with(tree, "-fsyntax-only", "-x", "c++", tree / "csrc/cpu/levels/base.cpp")
