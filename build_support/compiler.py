"""The C++ compiler: which one it is, the flags it gets, and the instruction levels that it can build."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # programs that stand before a compiler and run it
LEAST = {"g++": 11, "clang": 14}  # the oldest compilers that the package is built and tested with
# -fwrapv is not needed, but the kernels were tuned and measured with it; without it GCC unrolls other loops.
FLAGS = (
    "-O3",
    "-g0",
    "-std=c++20",
    "-ffp-contract=fast",
    "-fwrapv",
    "-fvisibility=hidden",
    "-fPIC",
    "-DNDEBUG",
)

# A flag that changes arithmetic gives other numbers than the tests have seen. With -Ofast and -ffast-math GCC also
# links code that makes the whole process flush subnormals, torch and numpy included. A flag that names an instruction
# set binds the base level to one processor. -flto takes the levels together, whose sources must stay apart.
LEFT_OUT = re.compile(
    r"-Ofast|-f(no-)?(fast-math|unsafe-math-opt|finite-math|associative-math|reciprocal-math|signed-zeros|trapping-math"
    r"|rounding-math|math-errno|fp-|denormal-fp|approx-func|cx-|single-precision|excess-precision|lto)"
    r"|-m(?!64$|cmodel=|macosx|branch-protection|(no-)?omit-leaf|llvm$)"
)


# The instruction levels above the base, the lower first: name, source in csrc/cpu/levels, and the registers that its
# code must mention.
LEVELS = (("AVX2", "avx2", "ymm"), ("AVX-512", "avx512", "zmm"))


class BuildError(SystemExit):
    """What hinders the build, in words. pip shows them when the installation fails."""

    def __init__(self, words: str) -> None:
        super().__init__(f"fastkm: {words}")


@dataclass(frozen=True)
class Compiler:
    command: list[str]  # the compiler with the flags that belong to it, a launcher before it
    compile_flags: list[str]  # of CPPFLAGS and CXXFLAGS
    link_flags: list[str]  # of LDFLAGS
    left_out: list[str]  # flags of the environment that are not passed on

    @property
    def launcher(self) -> list[str]:
        return self.command[:1] if Path(self.command[0]).name in LAUNCHERS else []

    @property
    def program(self) -> str:
        """The compiler itself, without launcher and flags."""
        return self.command[len(self.launcher)]

    def run(self, *arguments: str, source: str = "") -> subprocess.CompletedProcess:
        """Compile ``source``, as arguments say, with the flags of every file."""
        command = [*self.command, *self.compile_flags, *FLAGS, *arguments, "-x", "c++", "-"]
        return subprocess.run(command, input=source, capture_output=True, text=True)


def split_command(command: str) -> list[str]:
    """The words of a command. A path that has spaces and names a program is one word."""
    return [command] if shutil.which(command) else shlex.split(command)


def keep_flags(flags: list[str], left_out: list[str]) -> list[str]:
    """The flags that may be passed on; the others are added to ``left_out``."""
    left_out += [flag for flag in flags if LEFT_OUT.match(flag)]
    return [flag for flag in flags if not LEFT_OUT.match(flag)]


def find_compiler() -> Compiler:
    """CXX if it is set, else the compiler this Python was built with, else g++, c++ or clang++."""
    named = os.environ.get("CXX")
    commands = [named] if named else [sysconfig.get_config_var("CXX"), "g++", "c++", "clang++"]
    words = next((found for command in commands if command and is_there(found := split_command(command))), None)
    if words is None:
        raise BuildError(
            f"there is no C++ compiler ({named or 'g++'} not found). Install one (apt-get install g++) or name it with"
            " CXX. FASTKM_NO_EXT=1 installs the PyTorch reference alone, without the C++ extension."
        )
    left_out: list[str] = []
    variables = {name: shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CXXFLAGS", "LDFLAGS")}
    found = Compiler(
        [words[0], *keep_flags(words[1:], left_out)],
        keep_flags([*variables["CPPFLAGS"], *variables["CXXFLAGS"]], left_out),
        keep_flags(variables["LDFLAGS"], left_out),
        left_out,
    )
    if left_out:
        print(f"fastkm: left out of the flags in the environment, for they change results: {shlex.join(left_out)}")
    return found


def is_there(command: list[str]) -> bool:
    """Whether the program of a command, and the compiler behind its launcher, can be run."""
    compiler = command[1:2] if Path(command[0]).name in LAUNCHERS else []
    return all(shutil.which(word) for word in (command[0], *compiler))


def check_compiler(compiler: Compiler) -> None:
    """Refuse a compiler that is too old, fails, or changes arithmetic by itself."""
    name = shlex.join(compiler.command)
    told = compiler.run("-dM", "-E")
    if told.returncode:
        raise BuildError(f"{name} does not compile C++20; needs {least()}:\n{told.stderr.strip()[-1000:]}")
    macros = dict(re.findall(r"^#define (\w+) (.*)$", told.stdout, flags=re.M))
    kind = "clang" if "__clang__" in macros else "g++"
    version = int(macros.get("__clang_major__" if kind == "clang" else "__GNUC__", "0"))
    if version < LEAST[kind]:
        raise BuildError(f"needs {least()}; {name} is {kind} {version}")
    if "__FAST_MATH__" in macros:
        raise BuildError(
            f"{name} compiles with fast math by itself, which changes results and makes the whole process flush"
            " subnormals; name another compiler with CXX"
        )


def least() -> str:
    return " or ".join(f"{name} {version}" for name, version in LEAST.items()) + ", or newer"


def buildable_levels(compiler: Compiler) -> int:
    """How many instruction levels the compiler can build, the base first. What it cannot build is said."""
    for count, (name, stem, register) in enumerate(LEVELS, 1):
        source = Path("csrc", "cpu", "levels", f"{stem}.cpp")
        if platform.machine() not in ("x86_64", "AMD64") or not source.exists():
            return count
        if not can_build(compiler, source, register):
            print(f"fastkm: {shlex.join(compiler.command)} cannot build {name}; the library has no such kernels")
            return count
    return 1 + len(LEVELS)


def can_build(compiler: Compiler, source: Path, register: str) -> bool:
    """Whether a level becomes code of its own. A compiler may ignore an instruction set that it does not know."""
    made = compiler.run("-Icsrc", "-DFASTKM_PROBE", "-w", "-S", "-o", "-", source=source.read_text(encoding="utf-8"))
    return made.returncode == 0 and f"%{register}" in made.stdout
