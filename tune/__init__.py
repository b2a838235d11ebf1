"""Sweeps over techniques and sizes on Ray Tune. Empty so far: `pacos train` runs one configuration at a time."""
