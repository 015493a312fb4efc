"""Filtering: the memory as a causal layer, written and read at every step of a sequence."""

from fastkm.filtering.api import FilterResult, filter_posterior

__all__ = ["FilterResult", "filter_posterior"]
