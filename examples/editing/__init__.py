"""One layer of a transformer edited in place by `update_posterior`: ``python -m examples.editing``."""
