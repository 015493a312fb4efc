"""What an exact memory does on tasks that others defined for sequence layers: ``python -m examples.sequences``."""
