"""What is being built, in a header that csrc/bindings/build.cpp compiles in."""

import ast
import json
from pathlib import Path


def schemas_of(source: str) -> list[str]:
    """The operators that fastkm/_runtime/schema.py defines, in the order of the file."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    calls = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("_operator", "_question")]
    calls.sort(key=lambda call: call.lineno)
    return [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]


def write_header(path: Path, facts: dict[str, str]) -> None:
    """Each fact as a string macro. The file is written only if it changes, for it makes an object out of date."""
    lines = ["// Written by setup.py."]
    lines += [f"#define {name} {json.dumps(value)}" for name, value in facts.items()]  # JSON and C++ quote alike
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
