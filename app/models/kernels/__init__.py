"""Kernels of our own, each beside the plain torch code that defines what it computes."""
