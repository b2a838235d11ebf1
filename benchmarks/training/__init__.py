"""How fast LoRA trains here and elsewhere: `python -m benchmarks.training`, see `__main__.py`."""
