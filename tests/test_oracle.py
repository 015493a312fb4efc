"""The equations that results are compared with are independent of the package."""

import ast
from pathlib import Path


def test_the_equations_import_nothing_of_the_package():
    tree = ast.parse((Path(__file__).parent / "oracle" / "equations.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"math", "numpy", "torch"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
