"""Builds the CPU kernels of one level with any compiler, into a program without torch around ``driver.cpp``."""

import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DRIVER = Path(__file__).with_name("driver.cpp")
FOLDER = ROOT / "build" / "compilers"
FLAGS = ("-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fwrapv")  # as setup.py
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {CROSS: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}  # of Debian
COMPILERS = ("g++-11", "clang++-14", "clang++-19", "clang++")  # beside g++, which builds the package itself
LEVELS = ("base", "avx2", "avx512")
NAMES = {"base": "base", "avx2": "AVX2", "avx512": "AVX-512", "neon": "NEON"}  # as csrc/cpu/levels/dispatch.cpp


class Missing(Exception):
    """What is needed is not installed; the message says what to install."""


class Build(NamedTuple):
    """A compiler and the level it builds, as ``clang++-19:avx512``."""

    compiler: str
    level: str

    def __str__(self) -> str:
        return f"{self.compiler}:{self.level}"

    @property
    def emulated(self) -> bool:
        return self.compiler == CROSS and platform.machine() != "aarch64"


def parse(text: str) -> Build:
    compiler, colon, level = text.rpartition(":")
    if not colon or level not in (*LEVELS, "neon"):
        raise ValueError(f"expected COMPILER:LEVEL with a level of {', '.join(LEVELS)} or neon, got {text!r}")
    return Build(compiler, level)


def require(command: str) -> str:
    if found := shutil.which(command):
        return found
    package = PACKAGES.get(command, command.replace("clang++", "clang"))
    raise Missing(f"{command} is not installed: apt-get install {package}")


def levels_of(compiler: str) -> tuple[str, ...]:
    return ("neon",) if compiler == CROSS or platform.machine() == "aarch64" else LEVELS


def program_of(build: Build, source: Path = DRIVER) -> Path:
    return FOLDER / f"{source.stem}-{build.compiler}-{build.level}"


def command_to_run(build: Build, source: Path = DRIVER) -> list[str]:
    program = str(program_of(build, source))
    return [require(EMULATOR), program] if build.emulated else [program]


def compile_program(build: Build, source: Path = DRIVER, *, flags: tuple[str, ...] = FLAGS) -> None:
    """Compile ``source`` around the kernels of a level."""
    compiler, program = require(build.compiler), program_of(build, source)
    program.parent.mkdir(parents=True, exist_ok=True)
    level = CSRC / "cpu" / "levels" / f"{build.level}.cpp"
    defines = [f'-DFASTKM_LEVEL_SOURCE="{level}"', f"-DFASTKM_LEVEL_NAME={build.level}"]
    made, cache = program.with_suffix(".o"), [found] if (found := shutil.which("ccache")) else []
    options = [*flags, "-w", *defines, f"-I{CSRC}"]
    subprocess.run([*cache, compiler, *options, "-c", source, "-o", made], check=True)
    static = ["-static"] if build.emulated else []  # the emulator then needs no libraries of aarch64
    subprocess.run([compiler, *static, "-pthread", made, "-o", program], check=True)
