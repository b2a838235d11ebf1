"""The documented way on a running cluster: `ray start --head`, `ray job submit`, `serve deploy`, HTTP."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from app.config import TrainConfig, load_config
from app.data.prompts import PacosTemplate
from app.data.tokenization import load_tokenizer
from app.local_cluster import free_port
from app.methods.delta import merge_delta, read_delta
from app.models.checkpoints import load_decoder, save_decoder

pytestmark = [pytest.mark.own_ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node as `ray start --head` makes it; yields the environment that the command line needs."""
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_worker_niceness": "0"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    # `ray start` leaves its address in this folder, where every later Ray of the machine finds it. Short, for sockets.
    environment["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        f"--port={gcs}",
        "--num-cpus=6",
        "--node-ip-address=127.0.0.1",
    ]
    command += [
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={free_port()}",
        "--disable-usage-stats",
    ]
    log = (tmp_path_factory.mktemp("head") / "log").open("w+")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        wait_for(lambda: head.poll() is not None or httpx.get(url, timeout=2).is_success, what="the dashboard")
        log.seek(0)
        assert head.poll() is None, log.read()
        ready = environment | {"RAY_API_SERVER_ADDRESS": url, "RAY_DASHBOARD_ADDRESS": url, "GCS": f"127.0.0.1:{gcs}"}
        health = f"http://127.0.0.1:{agent}/api/healthz"  # of the node's agent, which starts jobs
        wait_for(lambda: httpx.get(health, timeout=5).is_success, what="the job agent")  # some time after the dashboard
        yield ready
    finally:
        if head.poll() is None:
            head.send_signal(signal.SIGTERM)  # `--block` takes its own processes down, and no other Ray's
            head.wait(timeout=60)
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


def wait_for(condition, *, what: str, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, f"{what} did not come up in {timeout_s} s"
        time.sleep(0.5)


def command_line(cluster: dict[str, str], *args: str) -> str:
    result = subprocess.run(
        [BIN / args[0], *args[1:]], env=cluster, cwd=REPOSITORY, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, f"{args}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def submit(cluster: dict[str, str], script: str, *args: str) -> str:
    return command_line(cluster, "ray", "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{script}", *args)


@pytest.fixture(scope="module")
def run_folder(
    cluster: dict[str, str], small_source: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Prepared and trained by submitted jobs."""
    folder = tmp_path_factory.mktemp("cluster")
    printed = submit(
        cluster, "prepare_data.py", f"source={small_source}", f"output={folder / 'data'}", f"model={tiny_model}",
        "max_length=96",
    )  # fmt: skip
    assert "records read" in printed
    printed = submit(
        cluster, "train.py", f"data={folder / 'data'}", f"output={folder / 'run'}", f"model={tiny_model}",
        "max_steps=4", "batch_size=8", "workers.cpus=0.5", "method.rank=4", "optimizer.learning_rate=0.01",
    )  # fmt: skip
    assert "held-out perplexity" in printed
    return folder


def test_submitted_jobs_prepare_and_train(run_folder: Path, tiny_model: Path) -> None:
    delta = read_delta(run_folder / "run/delta")
    assert delta.method.rank == 4
    config = load_config(TrainConfig, file=str(run_folder / "run/config.json"))
    assert config.model == str(tiny_model)


@pytest.mark.chaos
def test_a_submitted_sweep_finds_a_winner(
    cluster: dict[str, str], run_folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    printed = command_line(
        cluster, "ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "tune.sweep",
        f"output={tmp_path / 'sweep'}", f"train.data={run_folder / 'data'}", f"train.model={tiny_model}",
        "train.max_steps=4", "train.eval_every=2", "train.batch_size=8", "train.workers.cpus=2",
        "space.method.type=[lora,bitfit]", "search.type=grid", "scheduler.type=none", "finals.trials=0",
    )  # fmt: skip
    assert "2 finished, 0 stopped, 0 failed" in printed
    best = json.loads((tmp_path / "sweep/best.json").read_text())
    assert (Path(best["run"]) / "delta/delta.safetensors").exists()


def test_a_command_with_an_address_runs_on_that_cluster(
    cluster: dict[str, str], run_folder: Path, tiny_model: Path
) -> None:
    printed = command_line(
        cluster, "pacos", "evaluate", "--address", cluster["GCS"], f"data={run_folder / 'data'}",
        f"model={tiny_model}", f"delta={run_folder / 'run/delta'}", "workers.count=1",
    )  # fmt: skip
    assert "bits per byte" in printed


def test_serve_deploy_answers_as_transformers_does(
    cluster: dict[str, str], run_folder: Path, tiny_model: Path, tmp_path: Path, free_port: int
) -> None:
    config = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())
    config["http_options"]["port"] = free_port
    generator = config["applications"][0]["args"]["generator"]
    generator |= {"model": str(tiny_model), "deltas": {"tuned": str(run_folder / "run/delta")}}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    command_line(cluster, "serve", "deploy", str(tmp_path / "serve.yaml"))
    url = f"http://127.0.0.1:{free_port}"
    wait_for(lambda: httpx.get(f"{url}/healthz", timeout=5).status_code == 200, what="the endpoint")
    assert "status: RUNNING" in command_line(cluster, "serve", "status")
    prompt = PacosTemplate().prompt("Which continent is Chile part of?")
    body = {"model": "pacos:tuned", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == transformers_continuation(
        tiny_model, run_folder / "run/delta", prompt, tokens=12, folder=tmp_path
    )


@torch.no_grad()
def transformers_continuation(base: Path, delta: Path, prompt: str, *, tokens: int, folder: Path) -> str:
    """Greedy, by `transformers`, from the merged model as an exported GPT-2 folder."""
    from transformers import GPT2LMHeadModel

    model, tokenizer = load_decoder(base), load_tokenizer(base)
    merge_delta(model, read_delta(delta))
    exported = folder / "exported"
    exported.mkdir()
    save_decoder(exported, model)
    ids = torch.tensor([tokenizer.encode(prompt)])
    theirs = GPT2LMHeadModel.from_pretrained(exported).eval()
    output = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.end_id
    )
    answer = output[0, ids.shape[1] :].tolist()
    return tokenizer.decode(answer[: answer.index(tokenizer.end_id)] if tokenizer.end_id in answer else answer)
