"""Compiles what is out of date, several sources at a time, and links."""

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_support.compiler import BuildError


def compile_all(jobs: list[tuple[str, list[str]]], folder: Path) -> list[str]:
    """Objects under ``folder`` of sources, each with the command that compiles it, which lacks the names of files."""

    def compiled(job: tuple[str, list[str]]) -> str:
        source, command = job
        made = (folder / source).with_suffix(".o")
        command = [*command, "-MD", "-MF", str(made.with_suffix(".d")), "-c", source, "-o", str(made)]
        if not is_current(made, command):
            made.parent.mkdir(parents=True, exist_ok=True)
            run(command)
            made.with_suffix(".command").write_text(shlex.join(command), encoding="utf-8")
        return str(made)

    longest_first = sorted(jobs, key=lambda job: "levels" not in job[0])
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
        return list(pool.map(compiled, longest_first))


def is_current(made: Path, command: list[str]) -> bool:
    """Whether an object was made by this command and is newer than every file that the compiler read."""
    recorded, depends = made.with_suffix(".command"), made.with_suffix(".d")
    if not (made.exists() and depends.exists() and recorded.exists()):
        return False
    if recorded.read_text(encoding="utf-8") != shlex.join(command):
        return False
    listed = depends.read_text(encoding="utf-8").partition(": ")[2].replace("\\\n", " ")
    read = [Path(re.sub(r"\\(.)", r"\1", name)) for name in re.findall(r"(?:\\.|[^\s\\])+", listed)]
    return all(path.exists() and path.stat().st_mtime <= made.stat().st_mtime for path in read)


def run(command: list[str]) -> None:
    """Run a compiler; its own words are the error."""
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        raise BuildError(f"this command failed: {shlex.join(command)}")
