"""Settings of the documentation. `make docs` builds it into docs/_build/html without any use of the network."""

import sys
from importlib.resources import files
from pathlib import Path

import fastkm

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "fastkm"
author = "the fastkm authors"
copyright = author
release = version = fastkm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx.ext.mathjax",
    "equation_labels",  # docs/_ext: equations are numbered by their labels
    "shapes",  # docs/_ext: shapes of arguments and fields, taken from the comments beside them
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_ext"]
nitpicky = False

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
myst_dmath_double_inline = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature is shown with its shapes instead
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = "$ "

html_theme = "furo"
html_title = "fastkm"
# MathJax from an installed package, one file with its glyphs inside: pages draw their equations without the network.
html_static_path = ["_static", str(files("mathjax") / "static" / "mathjax" / "es5" / "tex-svg.js")]
mathjax_path = "tex-svg.js"
html_css_files = ["fastkm.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": False}
