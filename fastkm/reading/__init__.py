"""Reading: address the memory with a query and decode the weights, once or again and again."""

from fastkm.reading.api import AttractorResult, ReadResult, attractor_read, read, read_factored

__all__ = ["AttractorResult", "ReadResult", "attractor_read", "read", "read_factored"]
