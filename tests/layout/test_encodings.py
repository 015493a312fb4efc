"""Text files are UTF-8 whatever the locale: nothing reads or writes one in the encoding of the machine."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fastkm", "benchmarks", "examples", "tools")
LATER = {ROOT / "benchmarks" / "gpu.py"}
TEXT = {"read_text", "write_text"}


def without_encoding(source: str) -> list[str]:
    """The calls that open text in the locale's encoding, as ``line: call``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [x.value for x in (*node.args, *(k.value for k in node.keywords)) if isinstance(x, ast.Constant)]
        binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
        opens = isinstance(node.func, ast.Name) and name == "open" and not binary
        if opens or (isinstance(node.func, ast.Attribute) and name in TEXT):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_every_text_file_is_opened_with_its_encoding():
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 100
    found = [
        f"{path.relative_to(ROOT)}:{call}"
        for path in paths
        if path not in LATER
        for call in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='a')", True),
        ("(folder / 'x.md').write_text(page)", True),
        ("path.read_text()", True),
        ("open(path, 'rb')", False),
        ("path.read_text(encoding='utf-8')", False),
        ("write_text(path, page)", False),  # of fastkm._files
        ("image.open(data)", False),
    ],
)
def test_such_a_call_is_noticed(call, wrong):
    assert bool(without_encoding(call)) == wrong
