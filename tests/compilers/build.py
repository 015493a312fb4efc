"""Builds the CPU kernels of one level with any compiler, into a program without torch around ``driver.cpp``."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DRIVER = Path(__file__).with_name("driver.cpp")
FOLDER = ROOT / "build" / "compilers"
FLAGS = ("-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-w")  # as setup.py, which is held to it
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {CROSS: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}  # of Debian
COMPILERS = ("g++", "g++-11", "clang++-14", "clang++-19", "clang++", CROSS)
LEVELS = ("base", "avx2", "avx512")


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
    package = PACKAGES.get(command, command)
    raise Missing(f"{command} is not installed: apt-get install {package}")


def levels_of(compiler: str) -> tuple[str, ...]:
    return ("neon",) if compiler == CROSS or platform.machine() == "aarch64" else LEVELS


def command_to_run(build: Build, program: Path) -> list[str]:
    return [require(EMULATOR), str(program)] if build.emulated else [str(program)]


def compile_program(build: Build, source: Path, *flags: str, folder: Path = FOLDER) -> list[str]:
    """Compile ``source`` around the kernels of a level, and return the command that runs it."""
    compiler = require(build.compiler)
    level = CSRC / "cpu" / "levels" / f"{build.level}.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"{source.stem}-{build.compiler}-{build.level}"
    defines = [f'-DFASTKM_LEVEL_SOURCE="{level}"', f"-DFASTKM_LEVEL_NAME={build.level}"]
    cached = [shutil.which("ccache")] if shutil.which("ccache") else []
    object_file = program.with_suffix(".o")
    compiled = [*cached, compiler, *FLAGS, *flags, *defines, f"-I{CSRC}", "-c", str(source), "-o", str(object_file)]
    subprocess.run([part for part in compiled if part], check=True)
    static = ["-static"] if build.emulated else []  # the emulator then needs no libraries of aarch64
    subprocess.run([compiler, *flags, *static, "-pthread", str(object_file), "-o", str(program)], check=True)
    return command_to_run(build, program)
