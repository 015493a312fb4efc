"""Builds the C++ extension, when there is a compiler to build it with.

Two variables steer the build: FASTKM_NO_EXT=1 leaves the extension out, and CXX names the compiler. With no compiler
the package installs without the extension and the reference backend serves; a compile error stops the installation.
"""

import os
import shutil
from glob import glob

from setuptools import setup

STABLE_ABI_TORCH = "0x020a000000000000"  # torch 2.10: the oldest release the built extension loads with
PYTHON_TAG = "cp310"  # the oldest Python; the extension itself uses no Python API


def has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def extension() -> dict:
    if os.environ.get("FASTKM_NO_EXT") == "1":
        print("fastkm: FASTKM_NO_EXT=1, installing without the C++ extension")
        return {}
    if not has_compiler():
        print("fastkm: no C++ compiler found, installing without the C++ extension; the reference backend will serve")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    return {
        "ext_modules": [
            CppExtension(
                "fastkm._C",
                sorted(glob("csrc/*.cpp")),
                depends=sorted(glob("csrc/*.h")),
                define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI_TORCH)],
                extra_compile_args=["-O3", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall"],
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(**extension())
