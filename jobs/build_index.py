"""`pacos index` as a script: `ray job submit --working-dir . -- python jobs/build_index.py …`."""

from app.cli import main

if __name__ == "__main__":
    main("index")
