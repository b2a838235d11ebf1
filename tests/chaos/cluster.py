"""A Ray cluster on hosts: a head without work, three workers, and Redis servers on a host of their own."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.chaos.hosts import Host, hosts

BIN = Path(sys.executable).parent
WORKERS = ("worker-1", "worker-2", "worker-3")
CPUS = 3
"""Logical ones of each worker: a training worker that wants two has a host alone, and leaves one for the data."""
GCS_PORT, DASHBOARD_PORT, AGENT_PORT, SERVE_PORT = 6379, 8265, 52365, 8000
GCS_REDIS_PORT, CACHE_REDIS_PORT = 6379, 6380
OBJECT_STORE_BYTES = 150_000_000
START_WITHIN_S = 240.0
GIVES_UP_SOONER = {
    "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "8", "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "15000",
}  # fmt: skip
"""Every node's environment, as docs/cluster.md advises."""

KEEPS_LESS = {
    "RAY_task_events_max_num_task_in_gcs": "2000",
    "RAY_JEMALLOC_CONF": "narenas:1,tcache:false,background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0",
    "RAY_JEMALLOC_PROFILE": "raylet,gcs_server",
}
"""Every node's too, as there, but for fewer events: a soak's head has them all within the warm-up."""


class Cluster:
    """Of the hosts `head`, `redis` and `WORKERS`, all up."""

    def __init__(self, machines: dict[str, Host], token: str) -> None:
        self.head, self.redis = machines["head"], machines["redis"]
        self.workers = [machines[name] for name in WORKERS]
        self.shared = self.head.shared
        self.gcs = f"{self.head.address}:{GCS_PORT}"
        self.dashboard = f"http://{self.head.address}:{DASHBOARD_PORT}"
        self.cache_redis = f"redis://{self.redis.address}:{CACHE_REDIS_PORT}/0"
        self._token = token

    def start(self) -> None:
        for port in (GCS_REDIS_PORT, CACHE_REDIS_PORT):
            self.start_redis(port)
        self.start_head()
        self.start_workers(self.workers)

    def mend(self) -> None:
        """What a test has broken is whole again: every host up, with its Ray node."""
        for host in (self.redis, self.head, *self.workers):
            host.usual_speed()
            if not host.is_up:
                host.boot()
        for port in (GCS_REDIS_PORT, CACHE_REDIS_PORT):
            if not self.redis.processes(f":{port}"):
                self.start_redis(port)
        if not self.head.processes("gcs_server"):
            self.start_head()
        self.start_workers([worker for worker in self.workers if not worker.processes("raylet/raylet")])
        self.wait_for_nodes([self.head, *self.workers])

    def start_redis(self, port: int) -> None:
        folder = self.redis.disk / str(port)
        folder.mkdir(exist_ok=True)
        keeps = ("--appendonly", "yes") if port == GCS_REDIS_PORT else ("--save", "")
        inside = f"/tmp/{port}" if self.redis.in_namespaces else folder
        self.redis.start(
            ["redis-server", "--bind", self.redis.address, "--port", port, "--protected-mode", "no", "--dir", inside,
             *keeps],
            log=f"redis-{port}.log",
        )  # fmt: skip

    def start_head(self) -> None:
        def command() -> subprocess.Popen[bytes]:
            return self.head.start(
                ["ray", "start", "--head", "--block", "--num-cpus=0", f"--port={GCS_PORT}",
                 f"--dashboard-host={self.head.address}", f"--dashboard-port={DASHBOARD_PORT}", *self._node(self.head)],
                log="ray.log", RAY_REDIS_ADDRESS=f"{self.redis.address}:{GCS_REDIS_PORT}",
            )  # fmt: skip

        self._start_nodes({self.head: command})
        wait_for(self._takes_jobs, what="the head's job agent", within_s=START_WITHIN_S)

    def start_workers(self, workers: Sequence[Host]) -> None:
        def command(worker: Host) -> subprocess.Popen[bytes]:
            words = ["ray", "start", "--block", f"--address={self.gcs}", f"--num-cpus={CPUS}", *self._node(worker)]
            return worker.start(words, log="ray.log")

        self._start_nodes({worker: partial(command, worker) for worker in workers})

    def _start_nodes(self, commands: Mapping[Host, Callable[[], subprocess.Popen[bytes]]]) -> None:
        """Again and again, as a supervisor would: Ray gives a node up whose own agents take 15 s to start."""
        running: dict[Host, subprocess.Popen[bytes]] = {}

        def all_healthy() -> bool:
            for host, command in commands.items():
                if host not in running or running[host].poll() is not None:
                    host.end_processes()  # what a node that was given up has left
                    running[host] = command()
            return all(_answers(_health(host)) for host in commands)

        wait_for(all_healthy, what=" ".join(host.name for host in commands), within_s=START_WITHIN_S)

    def on_head(self, *command: object, timeout_s: float = 500) -> str:
        """Of the project's documentation: with the two variables that it says to export."""
        return self.head.run(
            command, timeout_s=timeout_s, RAY_API_SERVER_ADDRESS=self.dashboard, RAY_DASHBOARD_ADDRESS=self.dashboard
        )

    def submit(self, *command: object, timeout_s: float = 500) -> str:
        return self.on_head("ray", "job", "submit", "--working-dir", ".", "--", "python", *command, timeout_s=timeout_s)

    def submitted(self, *command: object, log: str) -> subprocess.Popen[bytes]:
        """The same, still running; what it prints is in `log` on the head's disk."""
        words = ["ray", "job", "submit", "--working-dir", ".", "--", "python", *command]
        return self.head.start(words, log=log, RAY_API_SERVER_ADDRESS=self.dashboard)

    def stop_jobs(self) -> None:
        """Ask those that run to end."""
        for job in self.asked("/api/jobs/"):
            if job["status"] == "RUNNING" and job["submission_id"] is not None:
                self.on_head("ray", "job", "stop", job["submission_id"])

    def asked(self, path: str) -> Any:
        """What the dashboard answers."""
        request = urllib.request.Request(f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {self._token}"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def nodes(self) -> dict[str, str]:
        """The address of each node that Ray takes to be alive, and its id."""
        rows = self.asked("/api/v0/nodes?limit=1000")["data"]["result"]["result"]
        return {row["node_ip"]: row["node_id"] for row in rows if row["state"] == "ALIVE"}

    def places_of(self, class_name: str, *, alive: bool = True) -> list[str]:
        """Addresses of the nodes where actors of this class are, or were."""
        rows = self.asked("/api/v0/actors?limit=10000&detail=true")["data"]["result"]["result"]
        addresses = {node: address for address, node in self.nodes().items()}
        found = [row for row in rows if row["class_name"] == class_name and (row["state"] == "ALIVE" or not alive)]
        return [addresses.get(row["node_id"], "of a node that is gone") for row in found]

    def host_at(self, address: str) -> Host:
        return next(host for host in (self.head, *self.workers) if host.address == address)

    def wait_for_nodes(self, expected: Sequence[Host], *, within_s: float = START_WITHIN_S) -> None:
        addresses = {host.address for host in expected}
        wait_for(lambda: set(self.nodes()) == addresses, what=f"nodes {addresses}", within_s=within_s)

    def _node(self, host: Host) -> list[object]:
        return [
            f"--node-ip-address={host.address}", f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--dashboard-agent-listen-port={AGENT_PORT}", "--disable-usage-stats",
        ]  # fmt: skip

    def _takes_jobs(self) -> bool:
        try:
            return isinstance(self.asked("/api/jobs/"), list)
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    token = uuid.uuid4().hex
    environment = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "LANG": "C.UTF-8",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # as KubeRay has it: nodes wait for a head
        **GIVES_UP_SOONER,
        **KEEPS_LESS,
    }
    with hosts(("head", "redis", *WORKERS), folder, environment=environment) as machines:
        made = Cluster(machines, token)
        made.start()
        yield made


def wait_for(condition: Callable[[], object], *, what: str, within_s: float = 120) -> float:
    """Until the condition holds; the seconds that it took. What cannot be asked yet does not hold."""
    began = time.monotonic()
    while True:
        try:
            if condition():
                return time.monotonic() - began
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() - began > within_s:
            raise TimeoutError(f"{what}: not within {within_s:.0f} s")
        time.sleep(0.2)


def _health(host: Host) -> str:
    return f"http://{host.address}:{AGENT_PORT}/api/healthz"


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=5) as response:
        return bool(response.status == 200)
