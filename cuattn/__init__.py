"""Exact attention in CUDA C, compiled just in time, for NumPy, CuPy, PyTorch and JAX arrays alike."""

__version__ = "0.1.0"
