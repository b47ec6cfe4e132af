"""The sketch kernels and a whole local step, checked and timed: ``python -m benchmarks.kernels``."""
