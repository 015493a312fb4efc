"""The commands of setuptools, made of the parts of this folder."""

import os
from glob import glob
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.egg_info import egg_info

from build_support import compiler as cxx
from build_support import cuda, facts, objects
from build_support.pytorch import find_torch

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        raise cxx.BuildError(
            "building needs setuptools 70.1 or newer, or the package wheel: pip install wheel"
        ) from None

LIBRARY = Path("fastkm", "_C.abi3.so")
SOURCES = sorted(glob("csrc/**/*.cpp", recursive=True))
CUDA_SOURCES = sorted(glob("csrc/**/*.cu", recursive=True))


def without_library() -> bool:
    return os.environ.get("FASTKM_NO_EXT") == "1"


def extensions() -> list[Extension]:
    return [] if without_library() else [Extension("fastkm._C", [*SOURCES, *CUDA_SOURCES])]


def label() -> str:
    """What the version says of a build: ``reference``, ``cpu`` or ``cu130``."""
    if without_library():
        return "reference"
    toolkit = cuda.find_toolkit() if CUDA_SOURCES else None
    return toolkit.label if toolkit else "cpu"


class LabelVersion(egg_info):
    """The version of a build ends in its label, which pip shows without being asked. A source distribution has none."""

    def finalize_options(self):
        self.tag_build = "" if "sdist" in self.distribution.commands else f"+{label()}"
        super().finalize_options()


class TagWheel(bdist_wheel):
    """The library uses no interface of Python, so that one wheel serves every Python, free-threaded ones too."""

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


class InstallEditable(editable_wheel):
    """A library of an earlier build does not outlive an editable installation without one."""

    def run(self):
        if without_library():
            LIBRARY.unlink(missing_ok=True)
        super().run()


class BuildLibrary(build_ext):
    """Compiles and links with the flags of this package, not with those that Python was built with."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".abi3.so"

    def build_extensions(self):
        compiler, torch = cxx.find_compiler(), find_torch()
        cxx.check_compiler(compiler)
        toolkit = cuda.find_toolkit() if CUDA_SOURCES else None
        levels = cxx.buildable_levels(compiler)
        folder = Path(self.build_temp)
        facts.write_header(folder / "facts" / "fastkm_build.h", facts_of(compiler, torch, toolkit))

        made = self._compile(compiler, torch, toolkit, levels)
        libraries = torch.link_flags + (cuda.libraries(toolkit.nvcc) if toolkit else [])
        library = Path(self.get_ext_fullpath("fastkm._C"))
        library.parent.mkdir(parents=True, exist_ok=True)
        objects.run([*compiler.command, "-shared", *made, *compiler.link_flags, *libraries, "-o", str(library)])

    def _compile(self, compiler, torch, toolkit, levels) -> list[str]:
        """The objects of the library. Only the bindings know torch and whether there are CUDA kernels."""
        folder = Path(self.build_temp)
        own = ["-Wall", "-Icsrc", f"-DFASTKM_LEVELS={levels}"]
        command = [*compiler.command, *compiler.compile_flags, *cxx.FLAGS, *own]
        binding = [*command, f"-I{folder / 'facts'}", *torch.compile_flags]
        if toolkit:
            architectures = ",".join(map(str, toolkit.architectures))
            binding += ["-DFASTKM_WITH_CUDA", f"-DFASTKM_CUDA_ARCHITECTURES={architectures}"]
        bindings = [source for source in SOURCES if source.startswith("csrc/bindings/")]
        kernels = [source for source in SOURCES if source not in bindings]
        jobs = [(source, binding) for source in bindings] + [(source, command) for source in kernels]
        if toolkit:
            jobs += [(source, cuda.compile_command(toolkit, compiler)) for source in CUDA_SOURCES]
        return objects.compile_all(jobs, folder)


def facts_of(compiler, torch, toolkit) -> dict[str, str]:
    """What csrc/bindings/build.cpp is told, by macro."""
    return {
        "FASTKM_SCHEMAS": "\n".join(facts.schemas_of(Path("fastkm/_runtime/schema.py").read_text(encoding="utf-8"))),
        "FASTKM_TORCH": torch.version,
        "FASTKM_CUDA_RELEASE": toolkit.release if toolkit else "",
        "FASTKM_FLAGS_LEFT_OUT": " ".join(compiler.left_out),
    }
