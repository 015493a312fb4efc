"""Times of single CPU kernels without torch or Python around them: ``python -m benchmarks.kernels BASE``."""
