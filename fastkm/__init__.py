"""fastkm: the memory of the Dynamic Kanerva Machine, fast."""

from fastkm._runtime.dispatch import explain_backend
from fastkm._runtime.errors import BackendUnavailableError
from fastkm.addressing import solve_addressing
from fastkm.filtering import FilterResult, filter_posterior
from fastkm.matrix_normal import KroneckerCovariance, MatrixNormal, kl_memory, kl_weights, logdet
from fastkm.nn.memory import KanervaMemory
from fastkm.posterior import PosteriorUpdate, update_posterior
from fastkm.reading import AttractorResult, ReadResult, attractor_read, read
from fastkm.state import MemoryState, load_memory_state, save_memory_state
from fastkm.writing import WriteResult, write

__version__ = "0.1.0"  # read by pyproject.toml; the installed version also names the build, as in 0.1.0+cpu

__all__ = [
    "AttractorResult",
    "BackendUnavailableError",
    "FilterResult",
    "KanervaMemory",
    "KroneckerCovariance",
    "MatrixNormal",
    "MemoryState",
    "PosteriorUpdate",
    "ReadResult",
    "WriteResult",
    "attractor_read",
    "explain_backend",
    "filter_posterior",
    "kl_memory",
    "kl_weights",
    "load_memory_state",
    "logdet",
    "read",
    "save_memory_state",
    "solve_addressing",
    "update_posterior",
    "write",
]
