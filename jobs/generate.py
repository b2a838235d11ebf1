"""`pacos generate` as a script: `ray job submit --working-dir . -- python jobs/generate.py …`."""

from app.cli import main

if __name__ == "__main__":
    main("generate")
