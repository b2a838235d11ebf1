"""`pacos quantize` as a script: `ray job submit --working-dir . -- python jobs/quantize.py …`."""

from app.cli import main

if __name__ == "__main__":
    main("quantize")
