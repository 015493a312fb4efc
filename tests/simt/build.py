"""Compile the CUDA kernels for the host, and let them replace the CPU kernels.

``build`` compiles what has changed into ``build/simt``. ``install`` loads the result as ``torch.ops.fastkm_simt`` and
makes ``torch.ops.fastkm`` call it for CPU tensors, so that the public functions run CUDA code.
"""

import fcntl
import subprocess
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
# build.cpp describes the extension and is left out.
BINDINGS = [path for path in sorted(CSRC.glob("bindings/*.cpp")) if path.stem != "build"]
STABLE_ABI_TORCH = "0x020a000000000000"
FLAGS = "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas -Wno-sign-compare"
# Flags of the kernels, and of the runtime, which is never instrumented. AddressSanitizer takes -O1: its code compiles
# nearly twice as fast and checks the same accesses. ThreadSanitizer keeps -O2, which the byte counts depend on.
SANITIZERS = {
    "plain": ("", ""),
    "address": ("-O1 -fsanitize=address -fno-omit-frame-pointer", "-DSIMT_ADDRESS_SANITIZER"),
    "thread": ("-fsanitize=thread", "-DSIMT_THREAD_SANITIZER"),
}


def build(sanitizer: str = "plain", target: str = "library", sources: list[Path] | None = None) -> Path:
    """Compile the library of all kernels, or with ``target="program"`` the given sources with a ``main``."""
    instrumented, runtime = SANITIZERS[sanitizer]
    folder = ROOT / "build" / "simt" / sanitizer
    include = Path(torch.__file__).with_name("include")
    if sources is None:
        sources = sorted([*CSRC.glob("cuda/**/*.cu"), *BINDINGS])
    name = "fastkm_simt.so" if target == "library" else sources[0].stem
    lines = [
        "rule compile",
        f"  command = g++ {FLAGS} -DFASTKM_SIMT $how -I{CSRC} -I{ROOT}/tests/simt -MMD -MF $out.d"
        " -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ {'-shared' if target == 'library' else ''} {instrumented} $in -o $out $libraries",
    ]
    objects = []
    for source in [ROOT / "tests/simt/simt.cpp", *sources]:
        how = runtime if source.name == "simt.cpp" else instrumented
        if source in BINDINGS:
            how = f"{instrumented} -DTORCH_TARGET_VERSION={STABLE_ABI_TORCH} -isystem {include}"
        objects.append(str(source.relative_to(ROOT).with_suffix(".o")))
        lines += [f"build {objects[-1]}: compile {source}", f"  how = {how}"]
    lines += [f"build {name}: link {' '.join(objects)}"]
    if target == "library":
        lines += [f"  libraries = -L{include.with_name('lib')} -ltorch_cpu -lc10"]
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{name}.ninja"
    ninja = Path(sys.executable).with_name("ninja")
    command = [ninja if ninja.exists() else "ninja", "-C", folder, "-f", script.name, "-j", "2"]
    with open(folder / "lock", "w") as lock:  # two processes of one test run may want the same build
        fcntl.flock(lock, fcntl.LOCK_EX)
        script.write_text("\n".join(lines) + "\n")
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the host build of the CUDA kernels failed:\n{done.stdout}{done.stderr}")
    return folder / name


def install(sanitizer: str = "plain") -> list[torch.library.Library]:
    """Route ``torch.ops.fastkm`` on the CPU to the CUDA kernels; undone when the libraries returned are dropped."""
    from fastkm._runtime import schema

    own, replaced = torch.library.Library("fastkm_simt", "DEF"), torch.library.Library("fastkm", "IMPL")
    for name in schema.OPERATORS:
        declared = str(getattr(torch.ops.fastkm, name).default._schema)
        own.define(declared.removeprefix("fastkm::"))
    torch.ops.load_library(str(build(sanitizer)))
    for name in schema.OPERATORS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkm_simt::{name}", "CPU"):
            kernel = getattr(torch.ops.fastkm_simt, name).default
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the kernel overrides another on purpose
                replaced.impl(name, kernel, "CPU", allow_override=True)
    return [own, replaced]


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
