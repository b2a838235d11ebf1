"""`pacos serve` as a script: `ray job submit --working-dir . -- python jobs/serve.py …`."""

from app.cli import main

if __name__ == "__main__":
    main("serve")
