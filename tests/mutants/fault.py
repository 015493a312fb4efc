"""What a fault is, and where in the tree it stands."""

import itertools
import re
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# What each language holds: the folder that is searched, the file suffixes, and the arguments of pytest that run it.
PLACES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "python": ("fastkm examples", (".py",), ()),
    "triton": ("fastkm", (".py",), ("--kernels=interpreter",)),
    "cpu": ("csrc/cpu csrc/bindings csrc/kernel_args.h", (".h", ".cpp"), ()),
    "cuda": ("csrc/cuda", (".cu", ".cuh", ".h"), ("--kernels=simt",)),
}


class Fault(NamedTuple):
    """One small mistake: where ``before`` stands, ``after`` is written.

    Whitespace does not count when ``before`` is looked for, so that a reformatted line is still found. In C++
    ``before`` is a statement, with its semicolon, or an expression that could stand in parentheses where it is: it
    becomes one branch of a switch.
    """

    id: str
    what: str  # in plain words
    place: str  # a key of PLACES
    before: str
    after: str
    tests: tuple[str, ...]  # those that ought to catch it, run first: "tests/test_x.py" or "tests/test_x.py::test_y"
    within: str = ""  # a longer piece of code around `before`, where that alone stands more than once
    survives: str = ""  # why no test can catch it; empty for a fault that must be caught

    @property
    def number(self) -> int:
        """By which a compiled fault is switched on: it does not depend on the other faults."""
        return zlib.crc32(self.id.encode()) & 0x7FFFFFFF

    @property
    def compiled(self) -> bool:
        return self.place in ("cpu", "cuda")

    @property
    def options(self) -> tuple[str, ...]:
        return PLACES[self.place][2]


def files_of(place: str, root: Path = ROOT) -> list[Path]:
    """The source files of a place; a Triton file says so in its name or in that of its folder."""
    folders, suffixes, _ = PLACES[place]
    found = []
    for folder in folders.split():
        path = root / folder
        found += [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in suffixes)

    def is_triton(path: Path) -> bool:
        return any(part.startswith("triton") for part in PurePosixPath(path.relative_to(root)).parts)

    return [path for path in found if place in ("cpu", "cuda") or is_triton(path) == (place == "triton")]


def as_pattern(code: str) -> str:
    """A regular expression for ``code`` with any whitespace between its tokens."""
    tokens = re.findall(r"\w+|[^\w\s]", code)
    pattern = ""
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        both_words = re.match(r"\w", token[-1]) and re.match(r"\w", following)
        pattern += re.escape(token) + (r"\s+" if both_words else r"\s*" if following else "")
    return pattern


class Found(NamedTuple):
    """Where a fault stands."""

    path: Path
    start: int
    end: int


class NotOneError(ValueError):
    """A snippet does not stand exactly once."""


def find(fault: Fault, read: Callable[[Path], str] = Path.read_text, root: Path = ROOT) -> Found:
    """The one place where ``fault.before`` stands."""
    found = []
    outer, inner = re.compile(as_pattern(fault.within or fault.before)), re.compile(as_pattern(fault.before))
    for path in files_of(fault.place, root):
        text = read(path)
        for around in outer.finditer(text):
            inside = [m for m in inner.finditer(text, around.start(), around.end())]
            found += [Found(path, m.start(), m.end()) for m in inside]
    if len(found) != 1:
        places = ", ".join(f"{x.path.relative_to(root)}:{read(x.path)[: x.start].count(chr(10)) + 1}" for x in found)
        raise NotOneError(f"{fault.id}: its code must stand once, it stands {len(found)} times ({places})")
    return found[0]


# ---- planting ------------------------------------------------------------------------------------------------------

# Put at the head of csrc/kernel_args.h, which every kernel includes. One number switches one fault on, several numbers
# with commas between them several.
SWITCHES = """
extern "C" char* getenv(const char*) noexcept;
inline bool fastkm_fault_is_on(int number) {
  const char* text = getenv("FASTKM_FAULTS");
  for (long found = 0; text && *text; ++text) {
    found = *text >= '0' && *text <= '9' ? 10 * found + (*text - '0') : 0;
    if (found == number && !(text[1] >= '0' && text[1] <= '9')) return true;
  }
  return false;
}
template <int NUMBER>
inline const bool fastkm_fault = fastkm_fault_is_on(NUMBER);
"""


def switched(fault: Fault, before: str) -> str:
    """C++ code that computes ``before``, or with the fault switched on ``after``."""
    flag = f"fastkm_fault<{fault.number}>"
    if before.endswith(";"):
        return f"{{ if ({flag}) {{ {fault.after} }} else {{ {before} }} }}"
    return f"({flag} ? ({fault.after}) : ({before}))"


def switched_sources(faults: list[Fault], root: Path = ROOT) -> dict[Path, str]:
    """The C++ files that hold faults, with a switch for each of them."""
    places = sorted(((find(fault, root=root), fault) for fault in faults), key=lambda x: (x[0].path, -x[0].start))
    texts: dict[Path, str] = {}
    contract = root / "csrc" / "kernel_args.h"
    for (path, start, end), fault in places:
        text = texts.get(path) or path.read_text()
        texts[path] = text[:start] + switched(fault, text[start:end]) + text[end:]
    for path, text in texts.items():
        if path != contract and '#include "kernel_args.h"' not in text:
            texts[path] = '#include "kernel_args.h"\n' + text
    before, once, after = (texts.get(contract) or contract.read_text()).partition("#pragma once\n")
    texts[contract] = before + once + SWITCHES + after
    return texts


def overlapping(faults: list[Fault], root: Path = ROOT) -> list[str]:
    """Pairs of compiled faults that want to change the same code: both cannot have a switch."""
    places = sorted((find(fault, root=root), fault.id) for fault in faults)
    return [
        f"{one} and {other}"
        for (a, one), (b, other) in itertools.pairwise(places)
        if a.path == b.path and b.start < a.end
    ]
