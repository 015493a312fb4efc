"""Installing with and without a compiler, and what ends up in a wheel. Builds copies of the tree, never the tree."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from pathlib import Path

import pytest

import fastkm
from fastkm import models
from fastkm._runtime import schema

ROOT = Path(__file__).parents[1]
PLATFORM = re.sub(r"[-.]", "_", sysconfig.get_platform())

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")


@pytest.fixture
def tree(tmp_path):
    """A copy of what is packaged, with one tiny source in place of the kernels and a stale build lying about."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "build_support", copy / "build_support", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "fastkm", copy / "fastkm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / "fastkm" / "_C.abi3.so").write_text("stale")
    (copy / "csrc").mkdir()  # no csrc/cuda, so that no toolkit is asked
    (copy / "csrc" / "answer.h").write_text("inline int answer() { return 42; }\n")
    (copy / "csrc" / "answer.cpp").write_text('#include "answer.h"\nint fastkm_answer() { return answer(); }\n')
    return copy


def run(*command, cwd, **environment) -> subprocess.CompletedProcess:
    unset = {"CXX", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "FASTKM_NO_EXT", "PYTHONPATH"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)


def pip(command, *arguments, cwd, **environment) -> subprocess.CompletedProcess:
    options = ("--no-build-isolation", "--no-deps", "--no-index")
    return run(sys.executable, "-m", "pip", command, *options, *arguments, ".", cwd=cwd, **environment)


def build_wheel(tree: Path, **environment) -> Path:
    done = pip("wheel", "--verbose", "--wheel-dir", "dist", cwd=tree, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


def explain(target: Path) -> str:
    """What a fresh process that imports fastkm from ``target`` says of its backends."""
    code = "import fastkm; print(fastkm.__file__, fastkm.__version__); fastkm.explain_backend('write')"
    done = run(sys.executable, "-c", code, cwd=target, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{target / 'fastkm'}")
    assert f" {fastkm.__version__}\n" in done.stdout
    return done.stdout


def test_without_the_extension_the_wheel_is_pure_and_imports(tree, tmp_path):
    wheel = build_wheel(tree, FASTKM_NO_EXT="1")
    assert wheel.name == f"fastkm-{fastkm.__version__}+reference-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")], "a stale build must not be shipped"
        archive.extractall(tmp_path / "target")
    said = explain(tmp_path / "target")
    assert "write: reference" in said
    assert "the C++ extension was not built" in said


SCRIPT = Path(__file__).with_name("typed_script.py")


@pytest.fixture
def installed(tree, tmp_path):
    """The Python of an environment where the wheel is installed, with what the wheel needs."""
    wheel, environment = build_wheel(tree, FASTKM_NO_EXT="1"), tmp_path / "environment"
    venv.create(environment, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "needed.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin" / "python"


def test_a_typed_script_passes_mypy_and_runs_with_the_installed_wheel(installed, tmp_path):
    pytest.importorskip("mypy", reason="in the lint extra")
    script = tmp_path / SCRIPT.name
    shutil.copy(SCRIPT, script)
    options = ("--strict", "--python-executable", str(installed), "--config-file", os.devnull)
    done = run(sys.executable, "-m", "mypy", *options, script.name, cwd=tmp_path)
    assert done.stdout == "Success: no issues found in 1 source file\n", done.stdout + done.stderr
    done = run(str(installed), script.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "write: reference" in done.stdout


def test_the_typed_script_uses_every_public_name_and_result_field():
    text = SCRIPT.read_text()
    for module in (fastkm, models):
        for name in module.__all__:
            assert re.search(rf"\b{name}\b", text), name
            for field in getattr(getattr(module, name), "_fields", ()):
                assert f".{field}, Tensor)" in text or f".{field}, fastkm." in text, f"{name}.{field}"


@pytest.mark.parametrize("missing", ["CXX", "PATH"])
def test_without_a_compiler_the_installation_says_what_to_do(tree, tmp_path, missing):
    """pip shows what a build printed only if it fails."""
    (tmp_path / "empty").mkdir()
    environment = {"CXX": "/nonexistent/g++"} if missing == "CXX" else {"PATH": str(tmp_path / "empty")}
    done = pip("install", "--target", str(tmp_path / "target"), cwd=tree, **environment)
    assert done.returncode != 0
    assert re.search(r"fastkm: there is no C\+\+ compiler .* FASTKM_NO_EXT=1 installs", done.stdout + done.stderr)


def test_without_the_extension_it_installs_and_pip_says_so(tree, tmp_path):
    target = tmp_path / "target"
    done = pip("install", "--target", str(target), cwd=tree, FASTKM_NO_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Successfully installed fastkm-{fastkm.__version__}+reference" in done.stdout
    assert "install a C++ compiler" in explain(target)


def test_an_editable_installation_without_the_extension_has_none(tree, tmp_path):
    """The fixture leaves a library of an earlier build there."""
    target = tmp_path / "target"
    done = pip("install", "--target", str(target), "--editable", cwd=tree, FASTKM_NO_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tree / "fastkm" / "_C.abi3.so").exists()


@needs_compiler
def test_one_wheel_serves_every_python(tree):
    """It is no Python module, so that free-threaded Python takes it as well."""
    wheel = build_wheel(tree)
    assert wheel.name == f"fastkm-{fastkm.__version__}+cpu-py3-none-{PLATFORM}.whl"
    with zipfile.ZipFile(wheel) as archive:
        built = archive.read("fastkm/_C.abi3.so")
    assert built.startswith(b"\x7fELF")
    assert b"fastkm_answer" in built


@needs_compiler
def test_the_flags_of_the_environment_are_passed_on_but_for_those_that_change_results(tree):
    flags = "-Ofast -march=native -ffast-math -DGIVEN=1"
    (tree / "csrc" / "answer.cpp").write_text(
        "#ifdef __FAST_MATH__\n#error fast\n#endif\nint fastkm_answer() { return GIVEN; }\n"
    )
    environment = {"CXXFLAGS": flags, "CFLAGS": "-Ofast", "LDFLAGS": "-Ofast -Wl,-z,now"}
    done = pip("wheel", "--verbose", "--wheel-dir", "dist", cwd=tree, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (link,) = re.findall(r"^.* -shared .*$", done.stdout + done.stderr, flags=re.M)
    assert "-Ofast" not in link
    assert "-Wl,-z,now" in link
    assert "left out of the flags in the environment" in done.stdout + done.stderr


@needs_compiler
def test_a_compile_error_is_loud(tree):
    (tree / "csrc" / "answer.cpp").write_text("int fastkm_answer() { return fourtytwo; }\n")
    done = pip("wheel", "--wheel-dir", "dist", cwd=tree)
    assert done.returncode != 0
    assert "fourtytwo" in done.stdout + done.stderr
    assert not list((tree / "dist").glob("*.whl"))


def test_source_distribution_holds_what_a_build_needs(tree):
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    done = run(sys.executable, "-c", code, cwd=tree, FASTKM_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(next((tree / "dist").glob("*.tar.gz")), tree / "unpacked")
    (unpacked,) = (tree / "unpacked").iterdir()
    assert unpacked.name == f"fastkm-{fastkm.__version__}"  # only a build has a label
    for name in (
        "setup.py",
        "build_support/compiler.py",
        "pyproject.toml",
        "csrc/answer.h",
        "csrc/answer.cpp",
        "fastkm/posterior/reference.py",
    ):
        assert (unpacked / name).exists(), name
    assert not list(unpacked.rglob("*.so"))


@pytest.mark.skipif(schema.unavailable is not None, reason="no extension here")
def test_the_extension_does_not_use_python():
    built = (Path(fastkm.__file__).parent / "_C.abi3.so").read_bytes()
    for word in (b"libpython", b"libtorch_python", b"PyObject", b"Py_Initialize", b"PyModule"):
        assert word not in built


class Index(http.server.BaseHTTPRequestHandler):
    """A package index whose one wheel is not what its name says."""

    def do_GET(self):
        wheel = re.search(r'WHEEL = "(.*)"', (ROOT / "tools/bootstrap_pip.py").read_text())[1]
        page = {"files": [{"filename": wheel, "url": f"../{wheel}", "hashes": {}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(page).encode() if self.path.endswith("/pip/") else b"something else")

    def log_message(self, *_):
        pass


def test_bootstrap_refuses_a_wheel_with_another_hash(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        index = f"http://127.0.0.1:{server.server_port}/simple"
        done = run(sys.executable, ROOT / "tools/bootstrap_pip.py", cwd=tmp_path, PIP_INDEX_URL=index, no_proxy="*")
        server.shutdown()
    assert done.returncode == 1
    assert "does not have the SHA-256" in done.stderr
    assert "Remedy: apt-get install python3-venv" in done.stderr
