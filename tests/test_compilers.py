"""Every compiler builds the levels that it names; ``make compilers`` and ``make arm`` test what they compute."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
import torch
from compilers import build, operators
from compilers.build import CSRC, Missing

import fastkm
from fastkm._runtime import schema
from fastkm.testing.operations import OPERATORS

COMPILERS = ("g++", *build.COMPILERS, build.CROSS)
OPTIONS = (*build.FLAGS, f"-I{CSRC}")
WIDTHS = {"base": 128, "avx2": 256, "avx512": 512}  # bits of the widest register


def needed(command: str) -> str:
    """The command, or a skip that says what to install."""
    try:
        return build.require(command)
    except Missing as error:
        pytest.skip(str(error))


@pytest.fixture(params=COMPILERS)
def compiler(request) -> str:
    needed(request.param)
    return request.param


def compiled(compiler: str, *options: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([compiler, *OPTIONS, *options], capture_output=True, text=True)


def instructions(compiler: str, made: Path) -> str:
    """The disassembly of an object, without its bytes and without symbols."""
    tool = needed(compiler.replace("g++", "objdump") if compiler == build.CROSS else "objdump")
    listing = subprocess.check_output([tool, "-d", "--no-show-raw-insn", made], text=True)
    return re.sub(r"<[^>]*>", "", listing)


def widest(code: str) -> int:
    return 512 if "%zmm" in code else 256 if "%ymm" in code else 128


# ---- levels --------------------------------------------------------------------------------------------------------


def test_a_level_has_its_own_registers(compiler, tmp_path):
    """The probe that the build asks a compiler with. clang ignores the pragma of g++, and would build SSE for all."""
    for level in build.levels_of(compiler):
        made = tmp_path / f"{level}.o"
        done = compiled(compiler, "-DFASTKM_PROBE", "-c", CSRC / "cpu" / "levels" / f"{level}.cpp", "-o", made)
        assert done.returncode == 0, done.stderr[-2000:]
        code = instructions(compiler, made)
        if level == "neon":
            assert re.search(r"fmla\s+v\d+\.4s", code)
        else:
            assert widest(code) == WIDTHS[level], level


def test_a_target_that_a_compiler_does_not_know_is_an_error(compiler, tmp_path):
    """The probe has to fail then; clang only warns."""
    if build.levels_of(compiler) == ("neon",):
        pytest.skip("NEON needs no target of its own")
    source = (CSRC / "cpu" / "levels" / "avx512.cpp").read_text()
    assert "x86-64-v4" in source
    unknown = tmp_path / "unknown.cpp"
    unknown.write_text(source.replace("x86-64-v4", "x86-64-v9"))
    done = compiled(compiler, "-DFASTKM_PROBE", "-c", unknown, "-o", tmp_path / "unknown.o")
    assert done.returncode != 0
    assert "x86-64-v9" in done.stderr


# Kernels that compute nothing, so that the choice between levels can be linked without them.
CHOICE = """
#include <cstdio>
#include "cpu/levels/dispatch.cpp"
#define FASTKM_STUB(level) \\
  namespace fastkm::level { \\
  template <class Real> const Kernels<Real>& kernels() { static const Kernels<Real> none{}; return none; } \\
  template const Kernels<float>& kernels(); \\
  template const Kernels<double>& kernels(); \\
  }
FASTKM_STUB(base) FASTKM_STUB(neon) FASTKM_STUB(avx2) FASTKM_STUB(avx512)
int main() {
  std::printf("%s\\n", fastkm::compiler());
  for (int64_t i = 0; fastkm::level_name(i); ++i) std::printf("%s ", fastkm::level_name(i));
  std::printf("\\n%d %d\\n", int(fastkm::select_level(99)), int(fastkm::select_level(-1)));
}
"""


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_build_knows_its_levels_and_its_compiler(compiler, levels, tmp_path):
    """A build without the highest levels offers those that it has; one for aarch64 has NEON, whatever is asked."""
    source, program = tmp_path / "choice.cpp", tmp_path / "choice"
    source.write_text(CHOICE)
    static = ["-static"] if compiler == build.CROSS else []
    done = compiled(compiler, f"-DFASTKM_LEVELS={levels}", *static, source, "-o", program)
    assert done.returncode == 0, done.stderr[-2000:]
    emulator = [needed(build.EMULATOR)] if build.Build(compiler, "neon").emulated else []
    told, names, chosen = subprocess.check_output([*emulator, program], text=True).splitlines()
    version = re.search(r"\d+\.\d+\.\d+", subprocess.check_output([compiler, "--version"], text=True))
    assert version
    assert told == f"{'clang++' if 'clang' in compiler else 'g++'} {version[0]}"
    assert names.split() == [build.NAMES[level] for level in build.levels_of(compiler)[:levels]]
    highest, lowest = map(int, chosen.split())
    assert lowest == 0
    assert 0 <= highest < len(names.split())


# ---- the program that answers operators ----------------------------------------------------------------------------


def changing_calls(p: oracle.Problem) -> list[torch.Tensor]:
    """What the operators that change their arguments compute."""
    out = fastkm.MemoryState(*map(torch.clone, p.state))
    fastkm.update_posterior(out, p.weights, p.values, p.noise_var, out=out, backend="native")
    fastkm.write(p.state, p.values, p.noise_var, p.ridge, out=out, backend="native")
    stream = fastkm.MemoryStream(p.state, p.noise_var[:, 0], p.ridge, backend="native")
    return [*out, *stream.write(p.values)[:3], *stream.update(p.weights, p.values)[:2], *stream.state]


def every_operator(p: oracle.Problem) -> list[torch.Tensor]:
    results = changing_calls(p)
    for name in schema.OPERATORS:
        given = OPERATORS[name].arguments(oracle.as_operands(p, num_iters=2, num_opt_iters=2))
        got = getattr(torch.ops.fastkm, name)(*given)
        results += got if isinstance(got, (tuple, list)) else [got]
    return [x for x in results if x.is_floating_point()]


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_the_program_answers_every_operator(tmp_path, monkeypatch):
    """Built without optimisation, in a tenth of the time; it computes what the extension does."""
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    level = "neon" if build.levels_of("g++") == ("neon",) else "base"
    one = build.Build("g++", level)
    needed("g++")
    build.compile_program(one, flags=("-O0", "-std=c++20", "-fwrapv"))
    p = oracle.problem(2, 3, 3, 5, 6)
    expected = every_operator(p)
    program = operators.Program(build.command_to_run(one))
    library = operators.take_over(program)
    try:
        got = every_operator(p)
    finally:
        library._destroy()
        program.close()
    assert program.answered == {*schema.OPERATORS, *schema.CHANGING}
    for ours, theirs in zip(got, expected, strict=True):
        oracle.assert_close(ours, theirs)


# ---- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-Ofast", "-ffast-math", "-ffinite-math-only"])
def test_flags_that_drop_nan_are_refused_in_words(compiler, flag, tmp_path):
    source = CSRC / "cpu" / "levels" / "dispatch.cpp"
    done = compiled(compiler, flag, "-c", source, "-o", tmp_path / "fast.o")
    assert done.returncode != 0
    assert re.search(r"fastkm: remove -Ofast, -ffast-math .* from CXXFLAGS", done.stderr)


# ---- registers -----------------------------------------------------------------------------------------------------


def loops(code: str) -> Iterator[list[str]]:
    """The bodies of loops that hold no other loop: from the target of a jump backwards to the jump."""
    for function in re.split(r"^[0-9a-f]+ :$", code, flags=re.M):
        lines = [(int(at, 16), text) for at, text in re.findall(r"^ +([0-9a-f]+):\t(.*)$", function, re.M)]
        place, last = {at: i for i, (at, _) in enumerate(lines)}, -1
        for i, (at, text) in enumerate(lines):
            jump = re.match(r"(?:b\.\w+|cbn?z\s+\w+,)\s+([0-9a-f]+)\b", text)
            target = int(jump[1], 16) if jump else at + 1
            if target <= at and (begin := place.get(target, -1)) > last:
                yield [text for _, text in lines[begin : i + 1]]
                last = i


def test_on_aarch64_a_tile_keeps_its_sums_in_registers(tmp_path):
    """24 sums, 3 vectors of B and a factor of A are fewer than 32 registers, if the factors are not loaded ahead."""
    needed(build.CROSS)
    source, made = tmp_path / "product.cpp", tmp_path / "product.o"
    source.write_text("""
#define FASTKM_PROBE
#include "cpu/levels/neon.cpp"
#include "cpu/linalg/product.h"
namespace fastkm::neon {
template <class Real> void multiply(const Matrix<Real>& c, int64_t k, const Operand<Real>& a, const Matrix<Real>& b) {
  product<Into::kSet>(c, k, a, b);
}
template void multiply(const Matrix<float>&, int64_t, const Operand<float>&, const Matrix<float>&);
template void multiply(const Matrix<double>&, int64_t, const Operand<double>&, const Matrix<double>&);
}
""")
    done = compiled(build.CROSS, "-c", source, "-o", made)
    assert done.returncode == 0, done.stderr[-2000:]
    tiles = [body for body in loops(instructions(build.CROSS, made)) if sum("fmla" in line for line in body) == 24]
    assert len(tiles) >= 2  # float and double
    assert not [line for body in tiles for line in body if "[sp" in line]
