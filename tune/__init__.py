"""Sweeps: many training runs through Ray Tune, to find the best technique, size and learning rate."""
