"""A network, a process and a file system namespace for a whole run, in which hosts can be made.

In there bridges, links and mounts may be made, also by who is not root, and all that was started or made goes with it,
however it ends. Where namespaces are not allowed, the hosts are groups of processes on addresses of the loopback
device.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from tests.chaos.hosts import IN_NAMESPACES

_UNSHARE = ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
_NEEDED = ("unshare", "nsenter", "ip", "tc")


def go_on_in_namespaces(command: Sequence[str]) -> NoReturn:
    """Put `command` in this process' place."""
    words = list(command)
    if all(map(shutil.which, _NEEDED)) and not subprocess.run([*_UNSHARE, "true"], capture_output=True).returncode:
        words = [*_UNSHARE, *words]
        os.environ[IN_NAMESPACES] = "1"
    else:
        print("no namespaces here: hosts are groups of processes, links are not cut", file=sys.stderr)
    os.execvp(words[0], words)
