"""Put something else in the place of a backend's kernel, for every way a public function reaches it."""

from collections.abc import Callable

from fastkm.addressing.api import FACTOR_ADDRESSING, SOLVE_ADDRESSING, SOLVE_FACTORED
from fastkm.filtering.api import FILTER_POSTERIOR
from fastkm.matrix_normal.api import KL_MEMORY, LOGDET
from fastkm.posterior.api import UPDATE_POSTERIOR
from fastkm.reading.api import READ, READ_FACTORED
from fastkm.removal.api import REMOVE_PATTERNS, REPLACE_PATTERNS
from fastkm.square_root.api import UPDATE_SQUARE_ROOT
from fastkm.writing.api import WRITE

KERNELS = {
    operation.name: operation
    for operation in (
        SOLVE_ADDRESSING,
        FACTOR_ADDRESSING,
        SOLVE_FACTORED,
        UPDATE_POSTERIOR,
        FILTER_POSTERIOR,
        WRITE,
        READ,
        READ_FACTORED,
        REMOVE_PATTERNS,
        REPLACE_PATTERNS,
        UPDATE_SQUARE_ROOT,
        KL_MEMORY,
        LOGDET,
    )
}


def replace_kernel(monkeypatch, operation: str, backend: str, wrap: Callable[[Callable], Callable]) -> None:
    declared = KERNELS[operation]
    monkeypatch.setitem(declared.kernels, backend, wrap(declared.kernels[backend]))
    if backend == "native":  # a plain call runs the operator itself
        monkeypatch.setattr(declared.native, "operator", wrap(declared.native.operator))
