"""Linear algebra that more than one family needs."""
