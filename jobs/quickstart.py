"""`pacos quickstart` as a script: `ray job submit --working-dir . -- python jobs/quickstart.py …`."""

from app.cli import main

if __name__ == "__main__":
    main("quickstart")
