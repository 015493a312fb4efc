"""An equation is numbered by its label.

The label ``C4`` is shown as ``(C4)``, so that code can cite a number that stays when an equation is added above it.
"""

from sphinx.application import Sphinx
from sphinx.domains.math import MathDomain
from sphinx.util import logging

logger = logging.getLogger(__name__)


class LabelledMath(MathDomain):
    """The domain of equations, with labels in place of a count."""

    def note_equation(self, docname, labelid, location=None):
        if labelid in self.equations:
            logger.warning("equation label %s is taken", labelid, location=location)
        self.equations[labelid] = (docname, labelid)


def setup(app: Sphinx) -> dict:
    app.add_domain(LabelledMath, override=True)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
