"""List what is long: files over 400 lines, functions over 60 lines, functions over 8 parameters.

    python tools/sizes.py [BASE]

With BASE, a revision, the list of that revision stands before that of the working tree. Functions are found by lizard;
a docstring counts as lines of its function. Everything that git tracks in C++, CUDA and Python is read.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lizard

ROOT = Path(__file__).parents[1]
LINES_OF_FILE, LINES_OF_FUNCTION, PARAMETERS = 400, 60, 8
CPP = (".h", ".cpp", ".cu", ".cuh")


def sources(revision: str | None) -> Iterator[tuple[str, str]]:
    """Path and text of every source, in the working tree or in ``revision``."""
    if revision is None:
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    else:
        listing = ["git", "ls-tree", "-r", "--name-only", revision]
    for path in sorted(subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()):
        if not path.endswith((*CPP, ".py")):
            continue
        if revision is not None:
            show = ["git", "show", f"{revision}:{path}"]
            yield path, subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        elif (ROOT / path).exists():
            yield path, (ROOT / path).read_text(encoding="utf-8")


def functions(path: str, text: str) -> list:
    """What lizard finds; it knows CUDA files by the name of a C++ file."""
    name = path if path.endswith(".py") else f"{path}.cpp"
    return lizard.analyze_file.analyze_source_code(name, text).function_list


def report(revision: str | None) -> None:
    files, long, wide, count = [], [], [], 0
    for path, text in sources(revision):
        lines = text.count("\n")
        if lines > LINES_OF_FILE:
            files.append(f"{lines:6}  {path}")
        for function in functions(path, text):
            count += 1
            where = f"{path}:{function.start_line} {function.name}"
            if function.length > LINES_OF_FUNCTION:
                long.append(f"{function.length:6}  {where}")
            if function.parameter_count > PARAMETERS:
                wide.append(f"{function.parameter_count:6}  {where}")
    print(f"\n# {revision or 'working tree'}: {count} functions")
    for title, found in (
        (f"files over {LINES_OF_FILE} lines", files),
        (f"functions over {LINES_OF_FUNCTION} lines", long),
        (f"functions over {PARAMETERS} parameters", wide),
    ):
        print(f"\n{title}: {len(found)}", *sorted(found, reverse=True), sep="\n")


if __name__ == "__main__":
    for revision in [*sys.argv[1:2], None]:
        report(revision)
