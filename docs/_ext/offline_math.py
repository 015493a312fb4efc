"""Equations as MathML, made by docutils, and numbered by their labels.

The usual way loads a script from the network whenever a page is opened. Browsers draw MathML by themselves. An equation
that has a label is shown with it: the label ``C4`` becomes ``(C4)``, so that code can cite a number that stays when an
equation is added above it.
"""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.domains.math import MathDomain
from sphinx.util import logging

logger = logging.getLogger(__name__)

# What docutils does not know, in words that it does.
SUBSTITUTES = {r"\mathrel{+}=": r"\text{ += }", r"\mathrel{-}=": r"\text{ −= }"}


class LabelledMath(MathDomain):
    """The label of an equation is its number."""

    def note_equation(self, docname, labelid, location=None):
        if labelid in self.equations:
            logger.warning("equation label %s is taken", labelid, location=location)
        self.equations[labelid] = (docname, labelid)


def mathml(node: nodes.Element, block: bool) -> str:
    tex = node.astext()
    for unknown, known in SUBSTITUTES.items():
        tex = tex.replace(unknown, known)
    try:
        return "".join(line.strip() for line in tex2mathml(tex, as_block=block).splitlines())
    except Exception as error:
        logger.warning("this equation cannot be drawn: %s", error, location=node)
        return ""


def visit_inline(self, node):
    self.body.append(mathml(node, block=False))
    raise nodes.SkipNode


def visit_block(self, node):
    self.body.append(self.starttag(node, "div", CLASS="equation"))
    self.body.append(mathml(node, block=True))
    if node["number"]:
        self.body.append(f'<span class="equation-number">({node["number"]})</span>')
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    app.add_domain(LabelledMath, override=True)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
