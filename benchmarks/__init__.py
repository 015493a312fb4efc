"""The benchmarks of a checkout, run as modules: ``python -m benchmarks.suite | compare | gpu``; see the Makefile.

The operations, their definitions, the verification and the timer are those of :mod:`fastkm.testing`.
"""
