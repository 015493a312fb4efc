"""Optional packages, and the errors that a user can put right."""

from importlib import import_module
from types import ModuleType


class UserError(Exception):
    """Something the user can put right; a command shows it without a traceback."""


def import_extra(module: str) -> ModuleType:
    """Import a package of the ``bench`` extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{module} does not import ({error}); pip install fastkm[bench]") from error
