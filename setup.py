"""Builds the C++ extension, when there is a compiler to build it with.

Two variables steer the build: FASTKM_NO_EXT=1 leaves the extension out, and CXX names the compiler. With no compiler
the package installs without the extension and the reference backend serves; a compile error stops the installation.
"""

import os
import shlex
import shutil
import sysconfig
from glob import glob

from setuptools import setup

STABLE_ABI_TORCH = "0x020a000000000000"  # torch 2.10: the oldest release the built extension loads with
PYTHON_TAG = "cp310"  # the oldest Python; the extension itself uses no Python API


def find_compiler() -> str | None:
    """CXX if it is set, else the compiler this Python was built with, else g++ or c++; ``None`` if there is none."""
    named = os.environ.get("CXX")
    for command in [named] if named else [sysconfig.get_config_var("CXX"), "g++", "c++"]:
        if command and shutil.which(shlex.split(command)[0]):
            return command
    return None


def extension() -> dict:
    if os.environ.get("FASTKM_NO_EXT") == "1":
        print("fastkm: FASTKM_NO_EXT=1, installing without the C++ extension")
        return {}
    compiler = find_compiler()
    if compiler is None:
        missing = os.environ.get("CXX", "g++")
        print(f"fastkm: no C++ compiler ({missing} not found), installing without the C++ extension")
        return {}
    if compiler != sysconfig.get_config_var("CXX"):
        os.environ["CXX"] = compiler
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    return {
        "ext_modules": [
            CppExtension(
                "fastkm._C",
                sorted(glob("csrc/*.cpp")),
                depends=sorted(glob("csrc/*.h")),
                define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI_TORCH)],
                extra_compile_args=["-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall"],
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(**extension())
