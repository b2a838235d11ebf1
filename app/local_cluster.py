"""Several Ray nodes on one machine, without containers: a head without work and workers, each `ray start` of its own.

For trying out what happens between nodes. All listen on localhost and want the user's token; their files lie in a
folder of their own, so that other Rays of the machine neither find them nor are found. Knows Ray by its command line.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.errors import UserError
from app.ray_cluster import LOCALHOST as HOST
from app.ray_cluster import TAKES_NODES, keep_token_private

GCS_PORT, DASHBOARD_PORT = 6379, 8265
START_WITHIN_S, STOP_WITHIN_S = 120.0, 30.0
OBJECT_STORE_SHARE, LEAST_OBJECT_STORE_BYTES = 0.3, 80_000_000
"""Of the machine's memory, for all nodes together, as Ray takes for one; and what a node needs."""

_LIKE_RAY = f"""
import os
from ray._private import services
from ray.scripts.scripts import main
services.resolve_ip_for_localhost = lambda host: host
os.environ["{TAKES_NODES}"] = "0"
main()
"""
RAY = (sys.executable, "-c", _LIKE_RAY)
"""The command `ray`, but 127.0.0.1 stays what it is, to the node and all that runs on it: Ray puts the address in its
place by which other machines reach this one, and then a node listens on all interfaces."""


@dataclass(frozen=True)
class LocalCluster:
    gcs: str
    """What `--address` takes."""
    dashboard: str
    """What `ray job submit` and `serve deploy` take, as RAY_API_SERVER_ADDRESS and RAY_DASHBOARD_ADDRESS."""


@dataclass
class _Node:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    health: str


@contextmanager
def local_cluster(*, nodes: int, cpus: int, program: Sequence[str] = ()) -> Iterator[LocalCluster]:
    """The cluster for the block: a head, and `nodes` workers of `cpus` logical CPUs each, all of them healthy.

    `program` is the `ray` to start.

    Raises:
        UserError: a node ends or does not answer in time; its last words are in the message.
    """
    ray = list(program or RAY)
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: the paths of Unix sockets are, too
    started: list[_Node] = []
    try:
        environment = _environment(folder)
        subprocess.run([*ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
        keep_token_private()
        gcs, dashboard = free_port(GCS_PORT), free_port(DASHBOARD_PORT)
        store = _object_store_bytes(nodes + 1)
        head = head_command(
            ray, gcs=gcs, dashboard=dashboard, agent=free_port(), client=free_port(), object_store=store
        )
        started.append(_start("head", head, environment, folder))
        _wait_until_healthy(started)
        for number in range(1, nodes + 1):
            worker = worker_command(ray, gcs=gcs, cpus=cpus, agent=free_port(), object_store=store)
            started.append(_start(f"worker {number}", worker, environment, folder))
            # One after the other: two that start at once would choose the same names for their sockets.
            _wait_until_healthy(started)
        yield LocalCluster(gcs=f"{HOST}:{gcs}", dashboard=f"http://{HOST}:{dashboard}")
    finally:
        _stop(started[1:])  # the head last: workers take leave of it
        _stop(started[:1])
        shutil.rmtree(folder, ignore_errors=True)


def head_command(
    ray: Sequence[str], *, gcs: int, dashboard: int, agent: int, client: int, object_store: int
) -> list[str]:
    return [
        *ray,
        "start",
        "--head",
        "--block",
        "--num-cpus=0",
        "--num-gpus=0",
        f"--port={gcs}",
        f"--dashboard-host={HOST}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
        *_of_every_node(agent, object_store),
    ]


def worker_command(ray: Sequence[str], *, gcs: int, cpus: int, agent: int, object_store: int) -> list[str]:
    return [
        *ray,
        "start",
        "--block",
        f"--address={HOST}:{gcs}",
        f"--num-cpus={cpus}",
        *_of_every_node(agent, object_store),
    ]


def _of_every_node(agent: int, object_store: int) -> list[str]:
    return [
        f"--node-ip-address={HOST}",
        f"--dashboard-agent-listen-port={agent}",  # else all nodes of a machine want the same
        f"--object-store-memory={object_store}",
        "--disable-usage-stats",
    ]


def _environment(folder: Path) -> Mapping[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ours = {"RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(folder)}
    return inherited | ours | {TAKES_NODES: "1"}  # else Ray refuses workers on macOS


def _start(name: str, command: list[str], environment: Mapping[str, str], folder: Path) -> _Node:
    agent = next(word.partition("=")[2] for word in command if word.startswith("--dashboard-agent-listen-port="))
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        # In a session of its own: Ctrl-C at the terminal is for us, who stop the nodes in their order.
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    return _Node(name, process, log, f"http://{HOST}:{agent}/api/healthz")


def _wait_until_healthy(nodes: Sequence[_Node]) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    for node in nodes:
        while not _answers(node.health):
            status = node.process.poll()
            if status is not None:
                raise UserError(f"the {node.name} ended with status {status}:\n{_last_words(node.log)}")
            if time.monotonic() > deadline:
                raise UserError(f"the {node.name} is not up after {START_WITHIN_S:.0f} s:\n{_last_words(node.log)}")
            time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(nodes: Sequence[_Node]) -> None:
    """`ray start --block` takes its own processes down, and no other Ray's."""
    for node in nodes:
        node.process.terminate()
    for node in nodes:
        try:
            node.process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(node.process.pid, signal.SIGKILL)
            node.process.wait()


def free_port(wanted: int = 0) -> int:
    """A free port, the one that is wanted if it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError:
            probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _object_store_bytes(nodes: int) -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(LEAST_OBJECT_STORE_BYTES, int(memory * OBJECT_STORE_SHARE / nodes))


def _last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
