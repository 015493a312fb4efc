"""Put something else in the place of a backend's kernel, wherever a public function reaches it from."""

from collections.abc import Callable

from fastkm import addressing, matrix_normal, posterior, reading, writing

# operation -> its table of backends, the module of the native one, and the operator a plain call goes straight to
KERNELS = {
    "update_posterior": (posterior._RUN, posterior.native, "operator"),
    "write": (writing._RUN, writing.native, "operator"),
    "read": (reading._RUN, reading.native, "operator"),
    "solve_addressing": (addressing._RUN, addressing.native, "operator"),
    "kl_memory": (matrix_normal._RUN_KL_MEMORY, matrix_normal.native, "kl_operator"),
    "logdet": (matrix_normal._RUN_LOGDET, matrix_normal.native, "logdet_operator"),
}


def replace_kernel(monkeypatch, operation: str, backend: str, wrap: Callable[[Callable], Callable]) -> None:
    table, native, operator = KERNELS[operation]
    monkeypatch.setitem(table, backend, wrap(table[backend]))
    if backend == "native":
        monkeypatch.setattr(native, operator, wrap(getattr(native, operator)))
