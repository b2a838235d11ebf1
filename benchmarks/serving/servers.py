"""The servers that are measured, each in a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

START_WITHIN_S = 300


@contextmanager
def pacos(model: str, *, threads: int, batch_size: int, log: Path, settings: Sequence[str] = ()) -> Iterator[str]:
    """`pacos serve` with `settings` beside the others; yields the URL."""
    port = _free_port()
    command = [
        sys.executable, "-m", "app.cli", "serve", f"port={port}", f"generator.model={model}",
        f"generator.threads={threads}", f"generator.max_batch_size={batch_size}", *settings,
    ]  # fmt: skip
    with _running(command, port=port, log=log) as url:
        yield url


@contextmanager
def fastapi_and_transformers(model: str, *, threads: int, log: Path) -> Iterator[str]:
    """A route that calls `transformers`' `generate`, as the services before this one did."""
    port = _free_port()
    script = Path(__file__).with_name("plain_server.py")
    command = [sys.executable, str(script), "--model", model, "--port", str(port), "--threads", str(threads)]
    with _running(command, port=port, log=log) as url:
        yield url


@contextmanager
def _running(command: list[str], *, port: int, log: Path) -> Iterator[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/healthz", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.5)
    raise SystemExit(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
