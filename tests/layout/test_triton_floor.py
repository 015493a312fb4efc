"""Triton 3.6, which comes with torch 2.10 and 2.11, compiles less than its successors; what it refuses is left out."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fastkm"
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if "triton.jit" in path.read_text(encoding="utf-8")]


def device_functions(text: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list):
            yield node


def refused(text: str) -> list[str]:
    """What Triton 3.6 does not compile: a plain string as a default, None as a result."""
    found = []
    for function in device_functions(text):
        defaults = (x for x in [*function.args.defaults, *function.args.kw_defaults] if x)
        if any(isinstance(x, ast.Constant) and isinstance(x.value, str) for x in defaults):
            found.append(f"{function.name}: a default is a string; make it a tl.constexpr")
        results = (x.value for x in ast.walk(function) if isinstance(x, ast.Return))
        if any(isinstance(x, ast.Constant) and x.value is None for x in results):
            found.append(f"{function.name}: returns None; return ()")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_device_functions_compile_with_the_oldest_triton(path):
    assert not refused(path.read_text(encoding="utf-8"))


def test_what_is_refused_is_found():
    text = """
@triton.jit
def product(a, b, precision: tl.constexpr = "ieee"):
    return a
@triton.jit
def optional(x):
    if x is None:
        return None
    else:
        return x
def launch(x, precision="ieee"):
    return None
"""
    assert [line.partition(":")[0] for line in refused(text)] == ["product", "optional"]
