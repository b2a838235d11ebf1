"""`python -m tests.chaos [pytest's arguments]`, which is `make chaos`: the faults, on hosts of this machine."""

import os
import sys

from tests.chaos.namespaces import go_on_in_namespaces


def main() -> None:
    arguments = sys.argv[1:]
    if not any(os.path.exists(word.partition("::")[0]) for word in arguments):
        arguments = ["tests/chaos", *arguments]
    go_on_in_namespaces([sys.executable, "-m", "pytest", *arguments])


if __name__ == "__main__":
    main()
