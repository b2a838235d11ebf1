"""The kinds of example instruction, by subject; `make_instructions.py` gathers them."""
