"""`pacos cluster up` with Ray's own nodes."""

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from certificates import certificates
from listening import listening

pytestmark = [pytest.mark.own_ray, pytest.mark.slow]

BIN = Path(sys.executable).parent
WHERE = """
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(address={gcs!r}, log_to_driver=False)

@ray.remote(num_cpus=1)
def where():
    return ray.get_runtime_context().get_node_id()

alive = [node for node in ray.nodes() if node["Alive"]]
workers = [node["NodeID"] for node in alive if node["Resources"].get("CPU")]
tasks = [where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in workers]
print("found", len(alive), len(workers), sorted(ray.get([task.remote() for task in tasks])) == sorted(workers))
"""


def test_tasks_run_on_both_workers_over_tls_and_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    """Ray's own TLS, which its environment variables turn on; without it the same is done in tests/test_cluster.py."""
    log, made = tmp_path / "up.log", certificates(tmp_path)
    tls = {
        "RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": made.certificate, "RAY_TLS_SERVER_KEY": made.key,
        "RAY_TLS_CA_CERT": made.authority,
    }  # fmt: skip
    with log.open("wb") as output:
        up = subprocess.Popen(
            [BIN / "pacos", "cluster", "up", "--nodes", "2", "--cpus", "1"],
            stdout=output, stderr=output, env=os.environ | tls | {"COLUMNS": "200"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while "Ctrl-C ends all of it" not in log.read_text():
            assert up.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        found = re.search(r"--address (\S+?:\d+)", log.read_text())
        assert found is not None
        exported = dict(word.split("=", 1) for word in re.search("export (.*)", log.read_text())[1].split())
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        script = subprocess.run(
            [sys.executable, "-c", WHERE.format(gcs=found[1])],
            env=environment | tls | exported, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert "found 3 2 True" in script.stdout, script.stderr
        with ssl.create_default_context(cafile=made.authority).wrap_socket(
            socket.create_connection(found[1].split(":"), timeout=10), server_hostname="127.0.0.1"
        ) as gcs:
            assert gcs.version() in ("TLSv1.2", "TLSv1.3")
        for process in psutil.Process(up.pid).children(recursive=True):
            for address in listening(process):
                assert address.is_loopback, f"{process.name()} listens on {address}"
    finally:
        up.send_signal(signal.SIGINT)
        status = up.wait(120)
    assert status == 0, log.read_text()
    deadline = time.monotonic() + 30
    while left := _of_the_cluster(found[1].encode()):
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.2)


def _of_the_cluster(address: bytes) -> list[bytes]:
    """The command lines of its processes."""
    return [
        words for file in Path("/proc").glob("[0-9]*/cmdline") if b"ray" in (words := _read(file)) and address in words
    ]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it has ended
        return b""
