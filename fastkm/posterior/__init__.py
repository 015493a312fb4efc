"""Posterior update of a memory when the weights of every pattern are given."""

from fastkm.posterior.api import PosteriorUpdate, update_posterior

__all__ = ["PosteriorUpdate", "update_posterior"]
