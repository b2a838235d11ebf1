"""The endpoint under load: `python -m benchmarks.serving --help`."""
