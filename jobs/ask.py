"""`pacos ask` as a script: `ray job submit --working-dir . -- python jobs/ask.py …`."""

from app.cli import main

if __name__ == "__main__":
    main("ask")
