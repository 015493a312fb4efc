"""Put something else in the place of a backend's kernel, wherever a public function reaches it from."""

from collections.abc import Callable

from fastkm.addressing import api as addressing
from fastkm.matrix_normal import api as matrix_normal
from fastkm.posterior import api as posterior
from fastkm.reading import api as reading
from fastkm.writing import api as writing

# operation -> its table of backends, and the native one, to whose operator a plain call goes straight
KERNELS = {
    "update_posterior": (posterior._RUN, posterior.native.update_posterior),
    "write": (writing._RUN, writing.native.write),
    "read": (reading._RUN, reading.native.read),
    "solve_addressing": (addressing._RUN, addressing.native.solve_addressing),
    "kl_memory": (matrix_normal._RUN_KL_MEMORY, matrix_normal.native.kl_memory),
    "logdet": (matrix_normal._RUN_LOGDET, matrix_normal.native.logdet),
}


def replace_kernel(monkeypatch, operation: str, backend: str, wrap: Callable[[Callable], Callable]) -> None:
    table, native = KERNELS[operation]
    monkeypatch.setitem(table, backend, wrap(table[backend]))
    if backend == "native":
        monkeypatch.setattr(native, "operator", wrap(native.operator))
