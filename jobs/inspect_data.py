"""`pacos inspect` as a script: `ray job submit --working-dir . -- python jobs/inspect_data.py …`."""

from app.cli import main

if __name__ == "__main__":
    main("inspect")
