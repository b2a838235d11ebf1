"""Generation by Pacos beside the peers: `python -m benchmarks.generation`."""
