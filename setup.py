"""Builds the compiled library of kernels: for the CPU with a C++ compiler, and for CUDA devices where there is nvcc.

Four variables steer the build: FASTKM_NO_EXT=1 leaves the library out, CXX names the compiler, FASTKM_CUDA says whether
the CUDA kernels are built: "auto" (the default) where a toolkit is found, "1" always, "0" never, and FASTKM_CUDA_ARCH
for which devices: "90" or "80,90". The toolkit decides, not a visible GPU nor the build of torch. With no compiler the
installation stops and says what to do. ``build_support`` has the parts.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pip runs this file without its folder on the path
from build_support import commands

setup(
    license="Apache-2.0",  # not in pyproject.toml, where setuptools before 77 and after it want different words
    ext_modules=commands.extensions(),
    cmdclass={
        "egg_info": commands.LabelVersion,
        "build_ext": commands.BuildLibrary,
        "bdist_wheel": commands.TagWheel,
        "editable_wheel": commands.InstallEditable,
    },
)
