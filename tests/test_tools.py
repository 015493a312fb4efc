"""The tools that make and try a release, on small things."""

import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "tools").exists(), reason="needs the source tree")
old_glibc = pytest.importorskip("tools.old_glibc")
matrix = pytest.importorskip("tools.matrix")

# Functions that glibc has given a newer version, one of each file that they come from, and the variable that is new.
SOURCE = """
#include <dlfcn.h>
#include <math.h>
void start(void*);
extern char __libc_single_threaded;
int use(double x, void* p) {
  start(p);
  return __libc_single_threaded + log(x) + logf(x) + (dlsym(0, "x") != 0);
}
"""

# Stands in an archive that is linked after the stubs, as the CUDA runtime is.
ARCHIVE = """
#include <pthread.h>
void start(void* p) {
  pthread_t thread;
  pthread_create(&thread, 0, (void* (*)(void*))p, 0);
}
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("objdump")), reason="needs gcc and objdump")
def test_a_library_is_linked_for_an_older_glibc(tmp_path):
    source, made, archive = tmp_path / "use.c", tmp_path / "use.so", tmp_path / "start.o"
    source.write_text(SOURCE, encoding="utf-8")
    subprocess.run(["gcc", "-fPIC", "-x", "c", "-c", "-", "-o", archive], input=ARCHIVE, text=True, check=True)
    subprocess.run(["ar", "rc", tmp_path / "libstart.a", archive], check=True)
    command = ["gcc", "-fPIC", "-shared", "-Wl,--as-needed", source, "-o", made]
    later = [f"-L{tmp_path}", "-lstart", "-lm"]
    subprocess.run([*command, *later], check=True)
    names = old_glibc.too_new(made, "2.28")
    if not names:
        pytest.skip("this glibc has nothing newer")
    subprocess.run([*command, *old_glibc.write_stubs(made, "2.28", tmp_path / "stubs"), *later], check=True)
    assert old_glibc.too_new(made, "2.28") == []
    needed = dict(old_glibc.symbols(made, undefined=True))
    assert {"pthread_create", "log", "logf", "dlsym"} <= set(needed), "every symbol has a version"
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(made)!r}).use"], check=True)


def test_the_pins_hold_torch_and_triton_as_they_are():
    printed = subprocess.check_output([sys.executable, ROOT / "tools" / "pins.py"], text=True).splitlines()
    assert f"torch=={torch.__version__}" in printed
    if "triton" in str(printed):
        assert f"triton=={version('triton')}" in printed


def test_no_extra_pins_torch_or_triton():
    text = (ROOT / "pyproject.toml").read_text()
    assert not re.findall(r'"(?:torch|triton)[^">]*(?:==|~=|<)[^"]*"', text)


CELL = {
    "torch": "2.10.0+cu128", "python": "3.10.13", "numpy": "2.2.6", "triton": "3.6.0", "compiler": "g++",
    "build": "60 s", "by": "g++ 12.2.0", "levels": "base, AVX2", "check": "10 of 10 within the allowed error",
    "core": {"counts": {"passed": 3, "failed": 1}, "failed": ["tests/a.py::b"], "seconds": 9, "status": 1},
}  # fmt: skip


def test_the_page_of_the_matrix_has_a_row_for_each_cell_and_names_what_failed():
    newer = {**CELL, "torch": "2.15.0", "triton": None, "build": "failed: fastkm: needs g++ 11"}
    del newer["core"], newer["levels"], newer["by"], newer["check"]
    lines = matrix.page({"b": newer, "a": CELL}).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert {len(row) for row in rows} == {10}
    assert rows[2][:3] == ["2.10.0+cu128", "3.10.13", "3.6.0"]
    assert rows[2][8] == "3 passed, 1 failed"
    assert rows[3][:3] == ["2.15.0", "3.10.13", "none"]
    assert rows[3][6:] == ["failed: fastkm: needs g++ 11", "–", "–", "–"]
    assert "* torch 2.10.0+cu128, g++: `tests/a.py::b`" in lines


def test_the_kept_page_of_the_matrix_has_the_floor():
    assert f"| {matrix.TORCHES[0]}" in matrix.PAGE.read_text(encoding="utf-8")


def test_the_floor_of_the_matrix_is_what_the_package_declares():
    declared = re.search(r'dependencies = \["torch>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert matrix.TORCHES[0].startswith(declared[1])
