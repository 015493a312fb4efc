"""The cells of the sweep: an operation at one K, C, T or Q, and B."""

from collections.abc import Collection
from functools import cache
from typing import NamedTuple

from benchmarks.ceiling import least_bytes
from fastkm.testing.operations import Case
from fastkm.testing.presets import Preset

OPERATIONS = ("update_posterior", "write", "read")
ROWS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CODES = {"K/2": 0.5, "K": 1.0, "2K": 2.0}  # C by K
LONGEST_CODE = 2048
COUNTS = (1, 16, 256)  # T of an update or a write, Q of a read
BATCHES = (1, 16, 1024)
MOST_BYTES = 2**31  # of what goes into a call and comes out of it


class Cell(NamedTuple):
    operation: str
    K: int
    C: int
    count: int  # T of an update or a write, Q of a read
    batch: int

    @property
    def case(self) -> Case:
        return Case(self.operation)

    @property
    def preset(self) -> Preset:
        return Preset(str(self), self.K, self.C, 1 if self.operation == "read" else self.count)

    @property
    def queries(self) -> int:
        return self.count if self.operation == "read" else 1

    @property
    def flops(self) -> int:
        """The fewest operations by which we know to compute it."""
        sizes = self.K, self.C, self.count, self.count
        return self.batch * sum(sum(operator.flops(*sizes)) for operator in self.case.operators)

    @property
    def bytes(self) -> int:
        """Every input read once and every output written once, in float32."""
        return _bytes(self)

    def __str__(self) -> str:
        letter = "Q" if self.operation == "read" else "T"
        return f"{self.operation} K={self.K} C={self.C} {letter}={self.count} B={self.batch}"


@cache
def _bytes(cell: Cell) -> int:
    return least_bytes(cell.case, cell.preset, cell.batch, cell.queries, "float32")


# Heads of attention: many memories that are too small for a row to fill a register.
TINY = Cell("update_posterior", 8, 16, 8, 4096)


def all_cells() -> list[Cell]:
    """Every cell that fits, :data:`TINY` last; within a batch and count the rows grow."""
    cells = [
        Cell(operation, K, round(K * ratio), count, batch)
        for operation in OPERATIONS
        for batch in BATCHES
        for count in COUNTS
        for K in ROWS
        for ratio in CODES.values()
        if K * ratio <= LONGEST_CODE
    ]
    return [*(cell for cell in cells if cell.bytes <= MOST_BYTES), TINY]


def select(
    cells: Collection[Cell],
    operations: Collection[str] = (),
    rows: Collection[int] = (),
    codes: Collection[int] = (),
    counts: Collection[int] = (),
    batches: Collection[int] = (),
) -> list[Cell]:
    """The cells whose operation and sizes are among those given; an empty choice is no condition."""
    choices = operations, rows, codes, counts, batches
    return [
        cell for cell in cells if all(not choice or size in choice for size, choice in zip(cell, choices, strict=True))
    ]
