"""The command line as a user meets it, as processes of their own."""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app import ray_cluster
from app.cli import main
from app.errors import Interrupted, UserError

REPOSITORY = Path(__file__).parent.parent
PACOS = str(Path(sys.executable).parent / "pacos")


def run(*args: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run(
        args, capture_output=True, text=True, cwd=cwd, timeout=120, env=os.environ | {"COLUMNS": "200"}
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """`here(*args)`: what `run` gives, from this process, which has imported already what takes seconds."""

    def run_here(*args: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["pacos", *args])
        monkeypatch.chdir(tmp_path)
        status: object = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(args, int(str(status or 0)), printed.out, printed.err)

    return run_here


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    result = run(sys.executable, "-X", "importtime", "-m", "app.cli", "--help")
    assert result.returncode == 0
    for command in (
        "prepare",
        "inspect",
        "pretrain",
        "train",
        "evaluate",
        "models",
        "promote",
        "ask",
        "index",
        "key",
        "serve",
        "quickstart",
    ):
        assert command in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "ray", "numpy", "transformers", "pydantic", "omegaconf", "fastapi"}


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "jobs").glob("*.py")))
def test_every_job_script_answers_help(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = REPOSITORY / "jobs" / script
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    monkeypatch.syspath_prepend(str(file.parent))  # as Python does
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(file), run_name="__main__")
    printed = capsys.readouterr()
    assert not end.value.code, printed.err
    assert "Usage" in printed.out or "usage" in printed.out


def test_a_job_script_answers_help_in_a_process_of_its_own() -> None:
    result = run(sys.executable, "jobs/train.py", "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["train", "metod.rank=3"], ["metod", "did you mean 'method'?"]),
        (["train", "--config", "absent.yaml"], ["absent.yaml does not exist"]),
        (["prepare", "source=absent.json", "output=/tmp/never"], ["absent.json", "no such file"]),
        (["prepare", "source=.", "output=/tmp/never"], ["is a folder; name the files in it"]),
        (["prepare", "source=5", "output=/tmp/never"], ["/5'", "no such file"]),
        (["prepare", "source=[]", "output=/tmp/never"], ["source=[]", "at least 1"]),
        (["prepare", "source=a", "output=o", "layout.type=packed", "layout.length=64"], ["layout.length=64", "512"]),
        (["prepare", "source=a", "output=o", "layout.typ=packed"], ["layout.typ", "did you mean 'type'?"]),
        (["inspect", "absent"], ["absent", "pacos prepare"]),
        (["train", "data=absent", "output=/tmp/never"], ["absent", "pacos prepare"]),
        (["ask", "question=Hi", "url=http://127.0.0.1:9"], ["127.0.0.1:9", "pacos serve"]),
        (["evaluate", "data=absent"], ["absent", "pacos prepare"]),
        (["promote", "alpaca", "first"], ["version='first'"]),
        (["promote", "alpaca", "1", "tracking.uri=sqlite:////tmp/never.db"], ["/tmp/never.db", "no such file"]),
        (["models", "tracking.uri=none"], ["turns MLflow off"]),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(args: list[str], parts: list[str], here) -> None:
    result = here(*args)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert all(part in result.stderr for part in parts), result.stderr


def test_a_mistakes_message_is_all_that_the_process_writes(tmp_path: Path) -> None:
    result = run(PACOS, "train", "data=absent", "output=/tmp/never", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == "" and result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_a_key_is_printed_once_and_its_hash_kept(here, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    made = here("key", "ana", f"keys_file={file}", "tokens_per_minute=500")
    assert made.returncode == 0, made.stderr
    key = made.stdout.split()[-1]
    assert key.startswith("pacos-") and key not in file.read_text() and "tokens_per_minute: 500" in file.read_text()
    again = here("key", "ana", f"keys_file={file}")
    assert again.returncode == 2 and "'ana' has a key" in again.stderr


def test_serve_checks_a_file_before_anything_is_deployed(here, tmp_path: Path) -> None:
    shipped = (REPOSITORY / "serve_config.yaml").read_text()
    (tmp_path / "right.yaml").write_text(shipped)
    (tmp_path / "wrong.yaml").write_text(shipped.replace("max_batch_size", "max_batchsize"))
    right = here("serve", "--check", "--config", str(tmp_path / "right.yaml"))
    assert right.returncode == 0 and "nothing is wrong" in right.stdout, right.stderr
    wrong = here("serve", "--check", "--config", str(tmp_path / "wrong.yaml"))
    assert wrong.returncode == 2 and "did you mean 'max_batch_size'" in wrong.stderr
    settings = here("serve", "--check", "generator.model=./none")
    assert settings.returncode == 2 and "none" in settings.stderr


def test_a_cluster_that_does_not_answer_is_told_within_ten_seconds(
    here, small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ray_cluster.ANSWER_WITHIN_S < 10
    monkeypatch.setattr(ray_cluster, "ANSWER_WITHIN_S", 1.0)
    monkeypatch.setattr("ray.shutdown", lambda: None)  # it would end the cluster that this process' tests share
    with socket.socket() as listener:  # accepts, and never says a word
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(UserError, match=re.escape(f"address='{address}' does not answer (1 s)")):
            ray_cluster._check_answers(address)
        assert time.monotonic() - started < 30
    nobody = here("prepare", f"source={small_source}", f"output={tmp_path / 'o'}", "--address", "127.0.0.1:9")
    assert nobody.returncode == 2
    assert "does not answer" in nobody.stderr
    assert "Traceback" not in nobody.stderr


@pytest.mark.parametrize(
    ("stop", "told"),
    [
        (KeyboardInterrupt(), "stopped; --resume goes on from there\n"),
        (Interrupted("stopped after step 5 of 9, which is saved"), "stopped after step 5 of 9, which is saved\n"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    stop: BaseException, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise stop

    monkeypatch.setattr("app.commands.train", interrupted)
    monkeypatch.setattr(sys, "argv", ["pacos", "data=somewhere", "output=elsewhere"])
    with pytest.raises(SystemExit) as ended:
        main("train")
    assert ended.value.code == 130
    assert capsys.readouterr().err == told


@pytest.mark.ray
@pytest.mark.slow
def test_prepare_on_a_cluster_of_its_own_and_what_it_prints(
    here, small_source: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(PACOS, "prepare", f"source={small_source}", "output=data", f"model={tiny_model}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "records read" in result.stdout
    assert "200" in result.stdout
    assert json.loads((tmp_path / "data/manifest.json").read_text())["rows"] == 200

    def on_ray(*args: object, **options: object) -> None:
        pytest.fail("nothing is left for Ray to do")

    monkeypatch.setattr("app.commands.on_ray", on_ray)
    again = here("prepare", f"source={small_source}", "output=data", f"model={tiny_model}")
    told = " ".join(again.stdout.split())  # the path may leave little room in a line
    assert again.returncode == 0 and "is up to date" in told and "dashboard" not in told

    shown = here("inspect", "data", "samples=1", "split=validation")
    assert shown.returncode == 0, shown.stderr
    assert "Instruction:" in shown.stdout and "in the loss" in shown.stdout
    assert (tmp_path / "data/report.html").exists()
