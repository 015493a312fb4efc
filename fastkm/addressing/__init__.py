"""Addressing: the weights over a memory's rows that explain a query."""

from fastkm.addressing.api import factor_addressing, solve_addressing, solve_factored

__all__ = ["factor_addressing", "solve_addressing", "solve_factored"]
