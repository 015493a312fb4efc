"""Matrix-normal mathematics: divergences, the distribution, and Kronecker-structured covariances."""

from fastkm.matrix_normal.api import KroneckerCovariance, MatrixNormal, kl_memory, kl_weights, logdet

__all__ = ["KroneckerCovariance", "MatrixNormal", "kl_memory", "kl_weights", "logdet"]
