"""Import in a fresh process: with nothing optional, with no extension, with a broken one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkm
from fastkm._runtime import schema

PACKAGE = Path(fastkm.__file__).parent
OPTIONAL = ("triton", "matplotlib", "rich", "mlxtend", "safetensors", "PIL", "pytest", "hypothesis")

EVERY_OPERATION = """
import torch, fastkm
state = fastkm.MemoryState(torch.randn(2, 3, 4), torch.eye(3).expand(2, 3, 3))
values, weights = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
fastkm.solve_addressing(state.mean, values, 1.0)
fastkm.update_posterior(state, weights, values, 1.0)
fastkm.write(state, values, 1.0, 1.0)
fastkm.read(state.mean, values, 1.0, num_iters=2)
fastkm.attractor_read(state, values, 1.0, 1.0, clean=torch.tanh, num_iters=2)
fastkm.kl_memory(state, state)
"""


def python(code, *, path=None, **variables):
    """Run code in a new interpreter, with ``path`` before everything else; what it printed, or its failure."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTKM", "PYTHON"))}
    environment |= {"PYTHONPATH": str(path or PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def without_extension(tmp_path):
    """A folder to import from that holds the package without its compiled part."""
    shutil.copytree(PACKAGE, tmp_path / "fastkm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_import_takes_nothing_optional():
    code = "import sys, torch; before = set(sys.modules); import fastkm; print(sorted(set(sys.modules) - before))"
    imported = {name.split(".")[0] for name in eval(python(code))}
    assert "fastkm" in imported
    assert not imported & set(OPTIONAL)


def test_works_with_nothing_optional_installed():
    """Importing any optional package fails, as if it were absent; every operation still runs."""
    block = f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n"
    python(block + EVERY_OPERATION)


def test_works_without_the_extension(without_extension):
    code = EVERY_OPERATION + "print(fastkm.__file__); fastkm.explain_backend('write'); print(fastkm.__version__)"
    where, taken, native, _, reference, version = python(code, path=without_extension).splitlines()
    assert Path(where).parent == without_extension / "fastkm"
    assert taken == "write: reference"
    assert "no: the C++ extension was not built" in native
    assert "install a C++ compiler" in native
    assert reference.split() == ["reference", "taken"]
    assert version == fastkm.__version__


def test_native_named_without_the_extension_raises(without_extension):
    code = """
import torch, fastkm
try:
    fastkm.read(torch.ones(1, 2, 3), torch.ones(1, 4, 3), 1.0, backend="native")
except fastkm.BackendUnavailableError as reason:
    print(reason)
"""
    said = python(code, path=without_extension)
    assert said.startswith("backend 'native' cannot run read: the C++ extension was not built")
    assert "backend='reference'" in said


@pytest.mark.parametrize("content", [b"not a library", b"\x7fELF" + bytes(60)], ids=["text", "header only"])
def test_a_broken_extension_is_a_reason_not_a_crash(content, without_extension):
    (without_extension / "fastkm" / "_C.abi3.so").write_bytes(content)
    code = EVERY_OPERATION + "fastkm.explain_backend('write')"
    taken, native, *_ = python(code, path=without_extension).splitlines()
    assert taken == "write: reference"
    assert "no: the C++ extension does not load with torch" in native


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_extension_is_taken_in_a_fresh_process():
    assert python(EVERY_OPERATION + "fastkm.explain_backend('write')").startswith("write: native\n")


def test_variable_is_read_in_a_fresh_process():
    said = python(EVERY_OPERATION + "fastkm.explain_backend('write')", FASTKM_BACKEND="reference")
    assert said.startswith("write: reference\n")


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_variable_is_read_once_and_means_nothing_when_empty():
    set_afterwards = "import os, fastkm; os.environ['FASTKM_BACKEND'] = 'reference'; fastkm.explain_backend('write')"
    for given in ({}, {"FASTKM_BACKEND": ""}):
        assert python(set_afterwards, **given).startswith("write: native\n")


def test_import_prints_and_warns_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import torch; import fastkm"],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_are_there():
    for name in fastkm.__all__:
        assert getattr(fastkm, name).__doc__, name


NEEDS_EXTENSION = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ('int precision,"\n    " int? values_type', 'int precision, bool more,"\n    " int? values_type', "read"),
        ("logdet(Tensor cov)", "logdet(Tensor covariance)", "logdet"),
        ("factor_addressing(Tensor mean,", "factor_addressing(Tensor rows,", "factor_addressing"),
    ],
)
def test_a_library_of_another_schema_is_recognised(tmp_path, before, after, named):
    """Before it is called: the names of the operators are the same, what they take is not."""
    shutil.copytree(PACKAGE, tmp_path / "fastkm", ignore=shutil.ignore_patterns("__pycache__"))
    page = tmp_path / "fastkm" / "_runtime" / "schema.py"
    text = page.read_text()
    assert before in text
    page.write_text(text.replace(before, after))
    code = "import fastkm; from fastkm._runtime import schema; print(schema.unavailable)"
    code += "; import torch; print(fastkm.logdet(torch.eye(3)[None]).item())"
    why, logdet = python(code, path=tmp_path).splitlines()
    assert why.startswith("the C++ extension is of another version, it differs in ")
    assert named in why
    assert float(logdet) == 0


@NEEDS_EXTENSION
def test_the_library_was_built_with_the_schemas_of_this_page():
    assert torch.ops.fastkm.built_schemas().splitlines() == list(schema.SCHEMAS.values())


@NEEDS_EXTENSION
def test_the_library_tells_how_it_was_built():
    facts = schema.build_facts()
    assert set(facts) == {"compiler", "instruction levels", "torch", "CUDA", "flags left out"}
    assert facts["compiler"].startswith(("g++ ", "clang++ "))
    assert facts["instruction levels"].startswith("base")
    assert facts["torch"].endswith("runs from 2.10")
    assert bool(facts["CUDA"]) == schema.has_cuda


SECOND_IMPORT = """
import importlib, sys
import fastkm
if {how!r} == "reload":
    importlib.reload(fastkm._runtime.schema)
else:
    kept = {{name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "fastkm"}}
    if {how!r} == "old one deleted":
        del kept, fastkm
    import fastkm
"""


@pytest.mark.parametrize("how", ["reload", "old one kept", "old one deleted"])
def test_the_package_can_be_imported_a_second_time(how):
    before = python(EVERY_OPERATION + "fastkm.explain_backend('write')")
    code = SECOND_IMPORT.format(how=how) + EVERY_OPERATION + "fastkm.explain_backend('write')"
    assert python(code) == before


def test_the_triton_kernels_can_be_imported_a_second_time():
    pytest.importorskip("triton")
    code = "import fastkm; from fastkm.writing import triton; print(triton.__name__)"
    assert python(code + SECOND_IMPORT.format(how="old one deleted") + code, TRITON_INTERPRET="1").count("writing") == 2


def test_the_package_runs_without_its_metadata(tmp_path):
    """Copied into another project, for example."""
    shutil.copytree(PACKAGE, tmp_path / "fastkm", ignore=shutil.ignore_patterns("__pycache__"))
    forget = """
import importlib.metadata as m
def find(name, real=m.version):
    if name == "fastkm":
        raise m.PackageNotFoundError(name)
    return real(name)
m.version = find
import fastkm
"""
    assert python(forget + "print(fastkm.__version__)", path=tmp_path) == f"{fastkm.__version__}\n"
