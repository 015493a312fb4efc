"""``python -m fastkm roofline``: the table of bounds in :mod:`fastkm.testing.roofline`, printed."""

import argparse

from fastkm.cli.console import show_table
from fastkm.testing.roofline import bound_table


def run(options: argparse.Namespace) -> int:
    title, headers, rows = bound_table(options.batch, options.queries)
    words = ("operator", "preset", "bound by")
    show_table(title, headers, rows, right=[header for header in headers if header not in words], group=1)
    return 0
