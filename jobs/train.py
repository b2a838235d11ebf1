"""`pacos train` as a script: `ray job submit --working-dir . -- python jobs/train.py …`."""

from app.cli import main

if __name__ == "__main__":
    main("train")
