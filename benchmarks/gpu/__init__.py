"""Benchmarks that want a CUDA device."""
