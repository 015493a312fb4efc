"""fastkm: the memory of the Dynamic Kanerva Machine, fast."""

from fastkm._runtime.dispatch import explain_backend
from fastkm._runtime.errors import BackendUnavailableError
from fastkm.addressing import factor_addressing, solve_addressing, solve_factored
from fastkm.filtering import FilterResult, filter_posterior
from fastkm.information import from_information, merge_memories, to_information, update_information
from fastkm.matrix_normal import KroneckerCovariance, MatrixNormal, kl_memory, kl_weights, logdet
from fastkm.nn.memory import KanervaMemory
from fastkm.posterior import PosteriorUpdate, update_posterior
from fastkm.reading import AttractorResult, ReadResult, attractor_read, read, read_factored
from fastkm.removal import remove_patterns, replace_patterns
from fastkm.square_root import from_square_root, to_square_root, update_square_root
from fastkm.state import (
    AddressingFactor,
    InformationState,
    MemoryState,
    SquareRootState,
    load_memory_state,
    save_memory_state,
)
from fastkm.streaming import MemoryStream, StreamUpdate, StreamWrite
from fastkm.writing import WriteResult, write

__version__ = "0.1.0"  # read by pyproject.toml; the installed version also names the build, as in 0.1.0+cpu

__all__ = [
    "AddressingFactor",
    "AttractorResult",
    "BackendUnavailableError",
    "FilterResult",
    "InformationState",
    "KanervaMemory",
    "KroneckerCovariance",
    "MatrixNormal",
    "MemoryState",
    "MemoryStream",
    "PosteriorUpdate",
    "ReadResult",
    "SquareRootState",
    "StreamUpdate",
    "StreamWrite",
    "WriteResult",
    "attractor_read",
    "explain_backend",
    "factor_addressing",
    "filter_posterior",
    "from_information",
    "from_square_root",
    "kl_memory",
    "kl_weights",
    "load_memory_state",
    "logdet",
    "merge_memories",
    "read",
    "read_factored",
    "remove_patterns",
    "replace_patterns",
    "save_memory_state",
    "solve_addressing",
    "solve_factored",
    "to_information",
    "to_square_root",
    "update_information",
    "update_posterior",
    "update_square_root",
    "write",
]
