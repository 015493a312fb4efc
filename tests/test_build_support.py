"""What setup.py decides: the compiler, its flags, the devices, what is out of date."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from fastkm._runtime import schema

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "build_support").exists(), reason="needs the source tree")
compiler = pytest.importorskip("build_support.compiler")
cuda = pytest.importorskip("build_support.cuda")
facts = pytest.importorskip("build_support.facts")
objects = pytest.importorskip("build_support.objects")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def program(tmp_path):
    """Make a program ``name`` that runs a shell script, and return its path."""

    def make(name: str, script: str = "exit 0") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def environment(monkeypatch):
    """Set variables of the build; those that are not given are unset."""

    def set_variables(**given: str) -> None:
        for name in ("CXX", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS", "FASTKM_CUDA", "FASTKM_CUDA_ARCH"):
            monkeypatch.delenv(name, raising=False)
        for name in ("CUDA_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return set_variables


# ---- which compiler ------------------------------------------------------------------------------------------------


def test_a_compiler_may_stand_behind_a_launcher_have_flags_or_lie_in_a_folder_with_a_space(program, environment):
    gxx, spaced = program("g++"), program("my tools/g++")
    folder = os.path.dirname(gxx)
    program("ccache")
    for named, launcher, wanted, flags in (
        (f"{folder}/ccache {gxx}", [f"{folder}/ccache"], gxx, []),
        (f"{gxx} -m64", [], gxx, ["-m64"]),
        (spaced, [], spaced, []),
        (f"{folder}/ccache '{spaced}' -m64", [f"{folder}/ccache"], spaced, ["-m64"]),
    ):
        environment(CXX=named)
        found = compiler.find_compiler()
        assert (found.launcher, found.program) == (launcher, wanted)
        assert found.command == [*launcher, wanted, *flags]


def test_a_launcher_of_a_compiler_that_is_not_there_is_no_compiler(program, environment):
    environment(CXX=f"{program('ccache')} /nonexistent/g++")
    with pytest.raises(SystemExit, match="FASTKM_NO_EXT=1"):
        compiler.find_compiler()


CHANGE_RESULTS = (
    "-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-ffinite-math-only", "-fassociative-math",
    "-freciprocal-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off",
    "-ffp-model=fast", "-march=native", "-mcpu=native", "-mtune=native", "-mavx512f", "-mfma", "-mno-avx2",
    "-mdaz-ftz", "-mrecip", "-mfpmath=387", "-flto=auto", "-fexcess-precision=fast",
)  # fmt: skip


@pytest.mark.parametrize("flag", CHANGE_RESULTS)
@pytest.mark.parametrize("where", ["CPPFLAGS", "CXXFLAGS", "LDFLAGS", "CXX"])
def test_a_flag_that_changes_results_is_left_out_wherever_it_stands(flag, where, program, environment):
    gxx = program("g++")
    given = {"CXX": gxx, where: f"{gxx} {flag}" if where == "CXX" else f"-DA=1 {flag} -g"}
    environment(**given)
    found = compiler.find_compiler()
    assert found.left_out == [flag]
    assert flag not in (*found.command, *found.compile_flags, *found.link_flags)


def test_other_flags_are_passed_on(program, environment):
    flags = "-I/usr/include/a -DNAME=1 -O2 -g -m64 -fstack-protector-strong -mbranch-protection=standard -Wformat"
    link = "-Wl,-z,relro -L/opt/lib -fuse-ld=gold"
    environment(CXX=program("g++"), CXXFLAGS=flags, LDFLAGS=link, CFLAGS="-Dof_c")
    found = compiler.find_compiler()
    assert (found.compile_flags, found.link_flags, found.left_out) == (flags.split(), link.split(), [])


# ---- what it can build ---------------------------------------------------------------------------------------------


@needs_compiler
def test_a_compiler_that_is_too_old_is_refused_in_words(program, environment):
    old = program("g++-9", 'echo "#define __GNUC__ 9"')
    environment(CXX=old)
    with pytest.raises(SystemExit, match=r"fastkm: needs g\+\+ 11 or clang 14, or newer; .* is g\+\+ 9"):
        compiler.check_compiler(compiler.find_compiler())


def test_a_compiler_that_does_not_work_is_refused_with_its_own_words(program, environment):
    environment(CXX=program("g++", "echo no licence >&2; exit 1"))
    with pytest.raises(SystemExit, match=r"(?s)does not compile C\+\+20.*no licence"):
        compiler.check_compiler(compiler.find_compiler())


@needs_compiler
def test_a_compiler_that_adds_fast_math_by_itself_is_refused(program, environment):
    environment(CXX=program("g++", f'exec {shutil.which("g++")} "$@" -ffast-math'))
    with pytest.raises(SystemExit, match="fast math by itself"):
        compiler.check_compiler(compiler.find_compiler())


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of x86-64 on Linux")
def test_a_level_that_the_compiler_cannot_build_is_left_out_and_said(program, environment, capsys, monkeypatch):
    """One refuses the architecture, one ignores it in silence."""
    if compiler.platform.machine() != "x86_64":
        pytest.skip("of x86-64")
    monkeypatch.chdir(ROOT)
    real = shutil.which("g++")
    environment(CXX=real)
    assert compiler.buildable_levels(compiler.find_compiler()) == 3
    refuses = 'code=$(cat); case "$code" in *x86-64-v4*) exit 1;; esac'
    ignores = "code=$(sed 's/arch=x86-64-v4/arch=x86-64/')"
    for does in (refuses, ignores):
        environment(CXX=program("g++", f'{does}; printf "%s\\n" "$code" | {real} "$@"'))
        assert compiler.buildable_levels(compiler.find_compiler()) == 2
        assert "cannot build AVX-512" in capsys.readouterr().out


# ---- CUDA ----------------------------------------------------------------------------------------------------------

NVCC = """
case "$*" in
  *--list-gpu-arch*) printf '{architectures}';;
  *--version*) echo 'Cuda compilation tools, release {release}, V{release}.1';;
esac
"""


@pytest.fixture
def toolkit(program, environment):
    """Put a CUDA toolkit there that compiles for these architectures."""

    def make(release: str, *architectures: int, **variables: str) -> None:
        listed = "".join(f"compute_{architecture}\\n" for architecture in architectures)
        nvcc = Path(program("cuda/bin/nvcc", NVCC.format(architectures=listed, release=release)))
        environment(CUDA_HOME=str(nvcc.parents[1]), **variables)

    return make


def test_a_toolkit_names_the_wheel(toolkit):
    toolkit("13.0", 80, 90, 100, 120)
    found = cuda.find_toolkit()
    assert (found.label, found.architectures) == ("cu130", (80, 90, 100))


def test_a_toolkit_without_the_newest_device_builds_the_others_and_says_so(toolkit, capsys):
    toolkit("12.4", 80, 86, 90)
    assert cuda.find_toolkit().architectures == (80, 90)
    assert "sm_100 needs CUDA 12.8; building sm_80, sm_90" in capsys.readouterr().out


@pytest.mark.parametrize(("named", "words"), [("100", "12.8"), ("90,100", "12.8"), ("75", "at least 80"), ("x", "x")])
def test_a_device_that_was_asked_for_and_cannot_be_is_refused(toolkit, named, words):
    toolkit("12.4", 80, 90, FASTKM_CUDA_ARCH=named)
    with pytest.raises(SystemExit, match=f"fastkm: .*{words}"):
        cuda.find_toolkit()


@pytest.mark.parametrize("flag", ["--use_fast_math", "-ftz=true", "-Xcompiler=-Ofast", "--fmad=false"])
def test_flags_that_nvcc_reads_by_itself_are_refused_if_they_change_results(toolkit, flag):
    toolkit("13.0", 80, 90, 100, NVCC_APPEND_FLAGS=f"-lineinfo {flag}")
    with pytest.raises(SystemExit, match="NVCC_APPEND_FLAGS holds"):
        cuda.find_toolkit()


def test_nvcc_is_given_the_compiler_without_its_launcher(program, toolkit):
    toolkit("13.0", 80, 90, 100, CXX=f"{program('ccache')} {program('g++')} -m64")
    command = cuda.compile_command(cuda.find_toolkit(), compiler.find_compiler())
    assert command[0].endswith("ccache")
    assert command[command.index("-ccbin") + 1].endswith("/g++")
    assert "-Xcompiler=-m64" in command


# ---- what is out of date -------------------------------------------------------------------------------------------


@needs_compiler
def test_only_what_changed_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a folder").mkdir()
    Path("a folder/one.h").write_text("#define ONE 1\n")
    Path("one.cpp").write_text('#include "one.h"\nint one() { return ONE; }\n')
    Path("two.cpp").write_text("int two() { return 2; }\n")
    ran: list[str] = []
    run = objects.run
    monkeypatch.setattr(objects, "run", lambda command: (ran.append(command[command.index("-c") + 1]), run(command)))

    def compiled(*flags: str) -> list[str]:
        ran.clear()
        command = ["g++", "-Ia folder", *flags]
        assert all(Path(made).exists() for made in objects.compile_all([("one.cpp", command), ("two.cpp", command)],
                                                                       Path("made")))  # fmt: skip
        return sorted(ran)

    assert compiled() == ["one.cpp", "two.cpp"]
    assert compiled() == []
    later = Path("made/one.o").stat().st_mtime + 1
    os.utime("a folder/one.h", (later, later))
    assert compiled() == ["one.cpp"]
    os.utime("made/one.o", (later + 1, later + 1))
    assert compiled("-DOTHER") == ["one.cpp", "two.cpp"]


def test_the_schemas_that_are_compiled_in_are_those_of_the_page():
    assert facts.schemas_of(Path(schema.__file__).read_text()) == list(schema.SCHEMAS.values())


@needs_compiler
def test_a_fact_may_hold_quotes_and_lines(tmp_path):
    value = 'a "b" \\ c\nd'
    facts.write_header(tmp_path / "fastkm_build.h", {"FACT": value})
    source = tmp_path / "print.cpp"
    source.write_text('#include "fastkm_build.h"\n#include <cstdio>\nint main() { std::fputs(FACT, stdout); }\n')
    program = tmp_path / "print"
    assert not os.spawnlp(os.P_WAIT, "g++", "g++", str(source), "-o", str(program))
    assert os.popen(str(program)).read() == value
