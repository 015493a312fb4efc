"""Shapes in the reference: what stands in a comment beside an argument or a field is shown with it.

The sources say ``values: Tensor,  # [B, T, C]`` once. This puts the comment behind the name in the list of arguments,
and lists the fields of a NamedTuple with their comments in place of "Alias for field number 0".
"""

import inspect
import re

from sphinx.application import Sphinx

BESIDE = re.compile(r"^\s+(\w+): [^#]+?,?\s+# (.+)$")
ARGUMENT = re.compile(r"^(\s+)(\w+): (.*)$")
SHAPE = re.compile(r"^(\[[^\]]*\])")


def comments(thing: object) -> dict[str, str]:
    """name -> the comment beside it, in the source of a function or a class."""
    try:
        lines = inspect.getsource(thing).splitlines()
    except (OSError, TypeError):
        return {}
    return {found[1]: found[2] for line in lines if (found := BESIDE.match(line))}


def show_shapes(app, what, name, thing, options, lines: list[str]) -> None:
    if what in ("function", "method"):
        shapes = comments(thing)
        for i, line in enumerate(lines):
            if (found := ARGUMENT.match(line)) and found[2] in shapes:
                lines[i] = f"{found[1]}{found[2]} ({shown(shapes[found[2]])}): {found[3]}"
    elif what == "class" and hasattr(thing, "_fields"):
        shapes = comments(thing)
        lines += ["", *(f"* ``{field}``: {shown(shapes.get(field, ''))}" for field in thing._fields), ""]


def shown(comment: str) -> str:
    """A comment as text, the shape that it begins with as code."""
    return SHAPE.sub(r"``\1``", comment)


def skip_fields(app, what, name, thing, skip, options) -> bool | None:
    return True if type(thing).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict:
    app.connect("autodoc-process-docstring", show_shapes, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
