"""Hours of mixed load on a cluster of hosts: `python -m benchmarks.soak --help`."""
