"""Build and test the package with every torch, Python, Triton and compiler that is there, and write what came of it.

    python tools/matrix.py                                   every torch of TORCHES, each in an environment made for it
    python tools/matrix.py --light                           the oldest and the newest torch alone
    python tools/matrix.py --python /path/bin/python ...     in environments that exist, into which nothing is installed

Every torch is tried with the first compiler, and the first torch with every other compiler; ``--all`` tries all pairs.
A cell is a copy of the sources, built there. Then ``python -m fastkm check`` and the tests of ``CORE`` run in it.
Results are kept in ``build/matrix/results.json``, so that a run cut short loses nothing, and are written into
docs/results/matrix.md. A cell that was run with the same sources is not run again, unless with ``--again``.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK, PAGE = ROOT / "build" / "matrix", ROOT / "docs" / "results" / "matrix.md"
RESULTS = WORK / "results.json"
TORCHES = ("2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.15.0")  # the floor, the newest, and those between
COMPILERS = ("g++", "g++-11", "clang++-14", "clang++-19")
NEEDS = ("setuptools", "wheel", "numpy", "pytest", "pytest-xdist", "hypothesis", "safetensors", "mlxtend", "pillow")

# What every torch must run: import and registration, the families, states, the way of a call, gradients, transforms,
# torch.compile. Left out is what tests tools, documents, examples and packaging.
FAMILIES = ("addressing", "posterior", "writing", "reading", "matrix_normal")
CORE = ("import", "registration", "backend", "call", "state", *FAMILIES, "memory", "gradients", "transforms", "compile")
INTERPRETED = "tests/gpu/test_reading.py"  # the Triton of this torch, in its interpreter

FACTS = """
import importlib.metadata as m, json, platform, torch
found = {d.metadata["Name"].lower() for d in m.distributions()}
print(json.dumps({
    "torch": torch.__version__, "python": platform.python_version(), "numpy": m.version("numpy"),
    "triton": m.version("triton") if "triton" in found else None,
}))
"""


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


def sources() -> list[Path]:
    """Every file of the project, committed or not."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT, check=True).stdout
    return [Path(name) for name in listed.splitlines() if (ROOT / name).is_file()]


def digest(paths: list[Path]) -> str:
    """One number for what is built and tested."""
    content = hashlib.sha256()
    for path in sorted(path for path in paths if path.parts[0] in ("csrc", "fastkm", "build_support", "tests")):
        content.update(str(path).encode() + (ROOT / path).read_bytes())
    return content.hexdigest()[:16]


def make_environment(torch: str) -> Path:
    """A Python with this torch, what torch brings, and what the tests need. The newest Python that has it is taken."""
    folder = WORK / "environments" / torch
    python = folder / "bin" / "python"
    if (folder / "ok").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={torch}"], check=True)
    pins = folder / "pins.txt"
    pins.write_text(run(python, ROOT / "tools" / "pins.py", check=True).stdout, encoding="utf-8")
    subprocess.run([*pip, "--constraint", pins, *NEEDS], check=True)
    (folder / "ok").touch()
    return python


class Cell:
    """One environment and one compiler."""

    def __init__(self, python: Path, compiler: str, jobs: int) -> None:
        self.python, self.compiler, self.jobs = python, compiler, jobs
        self.facts = json.loads(run(python, "-c", FACTS, check=True).stdout)
        self.name = f"torch {self.facts['torch']}, Python {self.facts['python']}, {compiler}"
        self.tree = WORK / "trees" / re.sub(r"\W+", "_", self.name)
        self.environment = os.environ | {"PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, float]:
        begin = time.monotonic()
        done = run(self.python, *arguments, cwd=self.tree, env=self.environment | variables)
        with open(self.tree / "matrix.log", "a", encoding="utf-8") as log:
            log.write(f"+ {shlex.join(arguments)}\n{done.stdout}{done.stderr}\n")
        return done, time.monotonic() - begin

    def copy(self, paths: list[Path]) -> None:
        """The sources. What did not change keeps its time, so that a second run builds little."""
        for path in paths:
            to = self.tree / path
            if not to.exists() or to.read_bytes() != (ROOT / path).read_bytes():
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, to)

    def results(self, paths: list[Path], tests: bool) -> dict:
        """What is built, checked and, with ``tests``, tested."""
        self.copy(paths)
        # The compiler is for the build alone: torch.compile also asks for CXX, and a user of a wheel does not set it.
        build_with = {"CXX": self.compiler, "FASTKM_CUDA": "0", "MAX_JOBS": str(self.jobs)}
        built, seconds = self.run("setup.py", "build_ext", "--inplace", **build_with)
        found = {**self.facts, "compiler": self.compiler, "build": f"{seconds:.0f} s"}
        if built.returncode:
            words = re.findall(r"^(?:.*error: .*|fastkm: .*)$", built.stdout + built.stderr, flags=re.M)
            return found | {"build": f"failed: {words[0][:200] if words else built.stderr[-200:]}"}
        told, _ = self.run("-m", "fastkm", "doctor")
        for key, label in (("by", "built by"), ("levels", "built levels")):
            found[key] = next(iter(re.findall(rf"^{label} +(.*)$", told.stdout, flags=re.M)), "none")
        checked, _ = self.run("-m", "fastkm", "check", "--presets", "S", "--threads", str(self.jobs))
        found["check"] = checked.stdout.strip().rpartition("\n")[2] or checked.stderr.strip().rpartition("\n")[2]
        if not tests:
            return found
        names = [f"tests/test_{name}.py" for name in CORE]
        found["core"] = self.tested("-n", str(self.jobs), "--dist", "loadfile", *names)
        if self.can_interpret():
            found["interpreter"] = self.tested("-n", str(self.jobs), "--kernels=interpreter", INTERPRETED)
        return found

    def can_interpret(self) -> bool:
        """Whether there is a Triton whose interpreter runs here; that of 3.6 needs NumPy before 2.4."""
        triton, numpy = self.facts["triton"], tuple(map(int, self.facts["numpy"].split(".")[:2]))
        return bool(triton) and not (triton.startswith("3.6.") and numpy >= (2, 4))

    def tested(self, *arguments: str) -> dict:
        """Counts of passed, failed and skipped tests, and the names of those that failed."""
        options = ("-rfE", "--tb=short", "-p", "no:cacheprovider")
        done, seconds = self.run("-m", "pytest", *options, *arguments)
        last = done.stdout.strip().rpartition("\n")[2]
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.M)
        return {"counts": counts, "failed": failed, "seconds": round(seconds), "status": done.returncode}


def told(result: dict | None) -> str:
    if result is None:
        return "not run"
    if not result["counts"]:
        return f"status {result['status']}"
    return ", ".join(f"{number} {word}" for word, number in result["counts"].items())


def page(kept: dict) -> str:
    """The results as a table, with the tests that failed below it."""
    headers = (
        "torch",
        "Python",
        "Triton",
        "NumPy",
        "compiler",
        "levels",
        "build",
        "check",
        "core tests",
        "interpreter",
    )
    cells = sorted(kept.values(), key=lambda cell: (tuple(map(int, cell["torch"].split(".")[:2])), cell["compiler"]))
    rows = [
        (
            cell["torch"], cell["python"], cell["triton"] or "none", cell["numpy"], cell.get("by", cell["compiler"]),
            cell.get("levels", "–"), cell["build"], cell.get("check", "–"),
            told(cell["core"]) if "core" in cell else "–", told(cell.get("interpreter")) if "core" in cell else "–",
        )
        for cell in cells
    ]  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in (headers, ["---"] * len(headers), *rows)]
    wrong = [
        f"* torch {cell['torch']}, {cell['compiler']}: `{name}`"
        for cell in cells
        for name in (*cell.get("core", {}).get("failed", ()), *(cell.get("interpreter") or {}).get("failed", ()))
    ]
    return f"""# Versions and compilers

Written by `make matrix`: the package built and tested with each torch, the Triton that it brings, and each compiler.
*check* is `python -m fastkm check --presets S`. *Core tests* are those of {", ".join(CORE)}.
*Interpreter* is `{INTERPRETED}`: Triton kernels in the interpreter of this Triton. That of 3.6 needs NumPy before 2.4.
*Build* is the time of what was out of date in this run, with a compiler cache. A dash stands for what was not run.

{chr(10).join(lines)}

{chr(10).join(["Failed:", "", *wrong]) if wrong else "No test failed."}
"""


def read_results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def keep_result(name: str, result: dict) -> None:
    """Read the file again before writing it, for another run may have added to it."""
    kept = read_results() | {name: result}
    RESULTS.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    PAGE.write_text(page(kept), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", type=Path, help="environments that exist; nothing is installed")
    parser.add_argument("--compilers", nargs="+", default=[c for c in COMPILERS if shutil.which(c)])
    parser.add_argument("--light", action="store_true", help="the oldest and the newest torch, one compiler")
    parser.add_argument("--all", action="store_true", help="every torch with every compiler")
    parser.add_argument("--untested", action="store_true", help="build and check only; a later run adds the tests")
    parser.add_argument("--again", action="store_true", help="also what was run with the same sources")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args()
    torches = TORCHES[:: len(TORCHES) - 1] if options.light else TORCHES
    pythons = [path.absolute() for path in options.python] if options.python else map(make_environment, torches)
    paths, sound = sources(), True
    for place, python in enumerate(pythons):
        first_only = (place > 0 and not options.all) or options.light
        for compiler in options.compilers[:1] if first_only else options.compilers:
            cell = Cell(python, compiler, options.jobs)
            result = read_results().get(cell.name, {})
            same = result.get("sources") == digest(paths) and (options.untested or "core" in result)
            if options.again or not same:
                print(f"{cell.name} ...", flush=True)
                result = cell.results(paths, not options.untested) | {"sources": digest(paths)}
                keep_result(cell.name, result)
            print(
                f"{cell.name}: build {result['build']}; {result.get('check')}; {told(result.get('core'))}", flush=True
            )
            sound = sound and "levels" in result and not result.get("core", {"status": 0})["status"]
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
