"""What more records, nodes, requests and documents cost, measured and simulated: see `__main__` and `measure`."""
