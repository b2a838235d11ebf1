"""`python -m tests.chaos [pytest's arguments]`, which is `make chaos`: the faults, on hosts of this machine.

Runs pytest in a network, a process and a file system namespace of its own. In there bridges, links and mounts may be
made, also by who is not root, and all that was started or made goes with it, however it ends. Where namespaces are
not allowed, the hosts are groups of processes on addresses of the loopback device.
"""

import os
import shutil
import subprocess
import sys

from tests.chaos.hosts import IN_NAMESPACES

NAMESPACES = ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
NEEDED = ("unshare", "nsenter", "ip", "tc")


def main() -> None:
    arguments = sys.argv[1:]
    if not any(os.path.exists(word.partition("::")[0]) for word in arguments):
        arguments = ["tests/chaos", *arguments]
    command = [sys.executable, "-m", "pytest", *arguments]
    if all(map(shutil.which, NEEDED)) and not subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
        command = [*NAMESPACES, *command]
        os.environ[IN_NAMESPACES] = "1"
    else:
        print("no namespaces here: hosts are groups of processes, links are not cut", file=sys.stderr)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
