"""`pacos evaluate` as a script: `ray job submit --working-dir . -- python jobs/evaluate.py …`."""

from app.cli import main

if __name__ == "__main__":
    main("evaluate")
