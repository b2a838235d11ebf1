"""`pacos pretrain` as a script: `ray job submit --working-dir . -- python jobs/pretrain.py …`."""

from app.cli import main

if __name__ == "__main__":
    main("pretrain")
