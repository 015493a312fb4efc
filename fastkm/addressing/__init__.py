"""Addressing: the weights over a memory's rows that explain a query."""

from fastkm.addressing.api import solve_addressing

__all__ = ["solve_addressing"]
