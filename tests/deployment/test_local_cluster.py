"""`pacos cluster up`: how its nodes are started, watched and ended, with processes that stand in for Ray's."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ray_start import options

from app.errors import UserError
from app.local_cluster import free_port, head_command, local_cluster, worker_command

REPOSITORY = Path(__file__).parents[2]

# Answers as Ray's agent does where it is told to, and writes down how it was called and that it was asked to end.
STAND_IN = """
import http.server, json, os, signal, sys, time
from pathlib import Path
calls, arguments = Path(sys.argv[1]), sys.argv[2:]
kind = "head" if "--head" in arguments else arguments[0] if arguments[0] != "start" else "worker"
(calls / f"{kind}-{os.getpid()}").write_text(json.dumps([arguments, dict(os.environ)]))
if kind == "get-auth-token":
    sys.exit()
if (calls / f"{kind}-fails").exists():
    sys.exit("no room on this device")
def end(*_):
    (calls / f"ended-{time.monotonic_ns()}").write_text(kind)
    sys.exit()
signal.signal(signal.SIGTERM, end)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/healthz" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
port = next(int(a.partition("=")[2]) for a in arguments if a.startswith("--dashboard-agent-listen-port="))
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


@pytest.fixture
def program(tmp_path: Path, calls: Path) -> list[str]:
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    return [sys.executable, str(script), str(calls)]


def called(calls: Path, kind: str) -> list[tuple[list[str], dict[str, str]]]:
    return [tuple(json.loads(file.read_text())) for file in calls.glob(f"{kind}-[0-9]*")]


def ended(calls: Path) -> list[str]:
    return [file.read_text() for file in sorted(calls.glob("ended-*"))]


def test_all_nodes_are_up_for_the_block_and_the_head_ends_last(program: list[str], calls: Path) -> None:
    with local_cluster(nodes=2, cpus=3, program=program) as cluster:
        (head,), workers = called(calls, "head"), called(calls, "worker")
        assert len(workers) == 2 and ended(calls) == []
        started = options(head[0][1:])
        assert (started["num_cpus"], started["num_gpus"]) == (0, 0), "the head has no work"
        assert cluster.gcs == f"127.0.0.1:{started['port']}"
        assert cluster.dashboard == f"http://127.0.0.1:{started['dashboard_port']}"
        joined = [options(arguments[1:]) for arguments, _ in workers]
        assert all(node["address"] == cluster.gcs and node["num_cpus"] == 3 for node in joined)
        agents = {node["dashboard_agent_listen_port"] for node in (started, *joined)}
        assert len(agents) == 3, "each node's agent has a port of its own"
        folder = Path(head[1]["RAY_TMPDIR"])
        assert folder.is_dir()
    assert sorted(ended(calls)) == ["head", "worker", "worker"] and ended(calls)[-1] == "head"
    assert not folder.exists()


def test_every_node_wants_the_users_token_and_no_other_ray(
    program: list[str], calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "203.0.113.1:6379")
    with local_cluster(nodes=1, cpus=1, program=program):
        environments = [environment for kind in ("head", "worker") for _, environment in called(calls, kind)]
    assert [arguments for arguments, _ in called(calls, "get-auth-token")] == [["get-auth-token", "--generate"]]
    assert all(environment["RAY_AUTH_MODE"] == "token" for environment in environments)
    assert not any("RAY_ADDRESS" in environment for environment in environments)
    assert len({environment["RAY_TMPDIR"] for environment in environments}) == 1


def test_the_token_is_made_its_owners_alone(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "auth_token"
    token.write_text("as Ray writes it")
    token.chmod(0o644)
    monkeypatch.setattr("app.ray_cluster.TOKEN_FILE", token)
    with local_cluster(nodes=1, cpus=1, program=program):
        assert token.stat().st_mode & 0o777 == 0o600


def test_everything_listens_on_localhost_with_flags_that_ray_has() -> None:
    head = options(head_command([], gcs=1, dashboard=2, agent=3, client=4, object_store=80_000_000)[1:])
    worker = options(worker_command([], gcs=1, cpus=2, agent=5, object_store=80_000_000)[1:])
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["node_ip_address"] == worker["node_ip_address"] == "127.0.0.1"
    assert head["block"] and worker["block"], "so that they take their own processes down"


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_a_node_that_ends_while_starting_is_told_and_the_others_go(program: list[str], calls: Path, kind: str) -> None:
    (calls / f"{kind}-fails").touch()
    with (
        pytest.raises(UserError, match=rf"(?s)the {kind}.* ended with status 1:.*no room on this device"),
        local_cluster(nodes=1, cpus=1, program=program),
    ):
        pytest.fail("it is not up")
    assert ended(calls) == ([] if kind == "head" else ["head"])


def test_a_taken_port_is_left_to_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def test_the_command_ends_its_nodes_when_it_is_told_to_end(program: list[str], calls: Path, tmp_path: Path) -> None:
    code = f"import app.local_cluster as c; c.RAY = {program!r}; from app.cli import main; main()"
    command = [sys.executable, "-c", code, "cluster", "up", "--nodes", "2", "--cpus", "1"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if line.startswith("export "))
        assert "RAY_AUTH_MODE=token" in line and "RAY_API_SERVER_ADDRESS=http://127.0.0.1:" in line
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    assert sorted(ended(calls)) == ["head", "worker", "worker"]
