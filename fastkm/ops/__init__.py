"""Operations in the layouts of other libraries: batch, time, heads."""

from fastkm.ops.sequences import chunk_posterior

__all__ = ["chunk_posterior"]
