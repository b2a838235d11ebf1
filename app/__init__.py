"""Pacos: fine-tune, sweep and serve instruction-following language models on one Ray cluster."""

__version__ = "0.1.0"
