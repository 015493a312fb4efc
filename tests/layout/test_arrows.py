"""Who may include or import whom. The tables below are the layout; docs/development/layout.md draws it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "fastkm"

# Room of csrc/ -> the rooms it may include beside itself. The contract, kernel_args.h, stands under all of them.
INCLUDES = {
    "kernel_args.h": set(),
    "cpu/linalg": set(),
    "cpu/posterior": {"cpu/linalg"},
    "cpu/reading": {"cpu/linalg"},
    "cpu/matrix_normal": {"cpu/linalg"},
    "cpu/writing": {"cpu/linalg", "cpu/posterior", "cpu/reading"},  # as an update conditions, and a read addresses
    "cpu/streaming": {"cpu/linalg", "cpu/posterior"},  # so does a stream
    "cpu/filtering": {"cpu/linalg", "cpu/posterior"},  # so does a filter
    "cpu/removal": {"cpu/linalg", "cpu/posterior"},  # a removal is an update of -U
    "cpu/square_root": {"cpu/linalg", "cpu/posterior"},  # it takes the same patterns
    "cpu/levels": {
        f"cpu/{wing}"
        for wing in (
            "linalg",
            "posterior",
            "filtering",
            "reading",
            "matrix_normal",
            "writing",
            "streaming",
            "removal",
            "square_root",
        )
    },
    "cuda/kernels.h": set(),
    "cuda/linalg": {"cuda/kernels.h"},
    "cuda/posterior": {"cuda/linalg"},
    "cuda/removal": {"cuda/linalg", "cuda/posterior"},
    "cuda/reading": {"cuda/linalg"},
    "cuda/matrix_normal": {"cuda/linalg"},
    "cuda/writing": {"cuda/linalg", "cuda/posterior"},
    "cuda/filtering": {"cuda/linalg", "cuda/posterior"},
    "bindings": {"cuda/kernels.h"},
}
SYSTEM = {"cuda/linalg": {"simt.h"}}  # the simulator that stands in for the CUDA runtime in tests

# Room of fastkm/ -> the rooms it may import beside itself.
FAMILIES = {
    "posterior",
    "filtering",
    "addressing",
    "reading",
    "writing",
    "matrix_normal",
    "removal",
    "information",
    "square_root",
}
FLOOR = {"state", "_runtime", "_linalg", "_files"}
IMPORTS = {
    "_files": set(),
    "state": {"_runtime", "_files"},
    "_runtime": {"state"},
    "_linalg": FLOOR,
    "addressing": FLOOR,
    "posterior": FLOOR,
    "filtering": FLOOR,
    "matrix_normal": FLOOR,
    "reading": FLOOR,
    "writing": FLOOR,
    "removal": FLOOR | {"posterior"},  # a removal is the update of −U, by the same kernels
    "information": FLOOR,
    "square_root": FLOOR,
    "streaming": FLOOR | {"reading", "removal"},  # it returns what a read returns, and removes what a removal does
    "ops": FLOOR | FAMILIES,  # families in the layouts of other libraries
    "distributed": FLOOR | FAMILIES,  # families on the ranks of a process group
    "nn": FLOOR | FAMILIES | {"ops"},
    "models": FLOOR | FAMILIES | {"nn"},
    "adapters": FLOOR | FAMILIES | {"nn"},
    "__init__": FLOOR | FAMILIES | {"nn", "streaming"},
    "testing": FLOOR | FAMILIES | {"nn", "models", "streaming", "__init__"},
    "cli": FLOOR | FAMILIES | {"nn", "models", "__init__", "testing"},
    "__main__": {"cli", "testing", "__init__"},
}
# A definition may be written with another family's definition: a write is made of a solve and an update, and the energy
# of an attractor read, which every backend computes in PyTorch, holds the divergence of the weights.
REFERENCES = {
    "reading/attractor": {"matrix_normal/reference"},
    "writing/reference": {"addressing/reference", "posterior/reference"},
    "reading/reference": {"addressing/reference"},
    "removal/reference": {"posterior/reference"},
}


def room_of(path: str, rooms: dict) -> str:
    """The longest room of the table that holds ``path``."""
    found = [room for room in rooms if path == room or path.startswith(room + "/")]
    assert found, f"{path} stands in no room of the table"
    return max(found, key=len)


def includes(source: Path) -> Iterator[str]:
    yield from re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', source.read_text(), flags=re.M)


def sources() -> list[Path]:
    return [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh", ".cpp", ".cu")]


def refusal(room: str, included: str) -> str | None:
    """Why a file of ``room`` may not include ``included``; ``None`` if it may."""
    if included.startswith("torch/") and room != "bindings":
        return "only bindings/ may include torch"
    if "/" not in included and "." not in included:
        return None  # the standard library
    if not (CSRC / included).exists():
        if (
            included in SYSTEM.get(room, ())
            or room == "bindings"
            or included.startswith(("cuda", "sys/", "cpuid", "immintrin"))
        ):
            return None
        return "it is neither a file of csrc/ nor a header this room may take from outside"
    other = room_of(included, INCLUDES)
    return None if other in (room, "kernel_args.h", *INCLUDES[room]) else f"{room} may not include {other}"


def test_includes_follow_the_arrows():
    found = [
        f"{source.relative_to(CSRC)} includes {included}: {why}"
        for source in sources()
        for included in includes(source)
        if (why := refusal(room_of(str(source.relative_to(CSRC)), INCLUDES), included))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "included"),
    [
        ("cpu/linalg", "torch/csrc/stable/library.h"),
        ("cpu/reading", "cuda/kernels.h"),
        ("cuda/reading", "cpu/linalg/arena.h"),
        ("cpu/matrix_normal", "cpu/posterior/update.h"),
        ("bindings", "cpu/posterior/update.h"),
    ],
)
def test_a_wrong_include_is_noticed(room, included):
    assert refusal(room, included)


def imports(source: Path) -> Iterator[str]:
    """Modules of fastkm that a file imports, at the top or in a function, as paths like ``posterior/reference``."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "fastkm":
                yield module_of(name)


def module_of(name: str) -> str:
    """``fastkm.posterior.reference.symmetry`` -> ``posterior/reference``: the longest prefix that is a module."""
    parts = name.split(".")[1:]
    while parts and not ((path := PACKAGE.joinpath(*parts)).with_suffix(".py").exists() or path.is_dir()):
        parts.pop()
    return "/".join(parts) or "__init__"


def import_refusal(importer: str, imported: str) -> str | None:
    """Why module ``importer`` may not import ``imported``; ``None`` if it may."""
    room, other = importer.split("/")[0], imported.split("/")[0]
    if importer.partition("/")[2].startswith(("native", "triton")) and imported.endswith("/reference"):
        return None if room == "_linalg" else "an optimised backend may not import a reference"
    if other == room or other in IMPORTS[room] or imported in REFERENCES.get(importer, ()):
        return None
    return f"{room} may not import {other}"


def test_imports_follow_the_arrows():
    found = []
    for source in sorted(PACKAGE.rglob("*.py")):
        importer = str(source.relative_to(PACKAGE).with_suffix("")).removesuffix("/__init__")
        assert importer.split("/")[0] in IMPORTS, f"{importer} stands in no room of the table"
        found += [
            f"fastkm/{importer} imports {imported}: {why}"
            for imported in imports(source)
            if (why := import_refusal(importer, imported))
        ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("reading/triton/forward", "reading/reference"),
        ("writing/api", "posterior/api"),
        ("_runtime/guards", "posterior/api"),
        ("models/convolutional", "testing/operations"),
        ("posterior/reference", "writing/reference"),
        ("testing/measure", "cli/console"),
    ],
)
def test_a_wrong_import_is_noticed(importer, imported):
    assert import_refusal(importer, imported)


def test_both_wings_have_the_same_rooms():
    cpu, cuda = ({path.name for path in (CSRC / wing).iterdir() if path.is_dir()} for wing in ("cpu", "cuda"))
    assert cpu - cuda == {"levels", "streaming", "square_root"}  # none has a kernel for a GPU
    assert cuda <= cpu


# What several kernels of a family share on a GPU, and what is part of one file on a CPU.
ON_GPUS_ONLY = {"posterior/chunk", "reading/addressing"}
# Results in place, which a GPU computes and then copies; memories that are computed again in double; a write of inner
# products; and small memories in the lanes of vector registers.
ON_CPUS_ONLY = {"posterior/update_into", "posterior/in_double", "writing/write_gram"} | {
    f"{family}/lanes" for family in ("posterior", "reading", "writing", "matrix_normal")
}


def test_both_wings_have_the_same_files():
    def files(wing: str) -> set[str]:
        folders = (CSRC / wing / family for family in ("posterior", "reading", "writing", "matrix_normal"))
        return {f"{folder.name}/{path.stem}" for folder in folders for path in folder.iterdir()}

    assert files("cuda") - files("cpu") == ON_GPUS_ONLY
    assert files("cpu") - files("cuda") == ON_CPUS_ONLY
