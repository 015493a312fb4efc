"""The PyTorch that the library is built with: its headers and its libraries."""

from dataclasses import dataclass

from build_support.compiler import BuildError

OLDEST = (2, 10)  # the built library loads with this release and every later one


@dataclass(frozen=True)
class Torch:
    version: str
    compile_flags: list[str]
    link_flags: list[str]


def find_torch() -> Torch:
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise BuildError(
            f"building needs torch {OLDEST[0]}.{OLDEST[1]} or newer in the environment that builds ({error}):"
            " install torch, then pip install --no-build-isolation"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        raise BuildError(f"needs torch {OLDEST[0]}.{OLDEST[1]} or newer, this is {torch.__version__}")
    major, minor = OLDEST
    macros = [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"]
    macros += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    headers = [word for path in include_paths() for word in ("-isystem", path)]
    libraries = [f"-L{path}" for path in library_paths()]
    return Torch(str(torch.__version__), [*macros, *headers], [*libraries, "-ltorch", "-ltorch_cpu", "-lc10"])
