"""Passwords, keys and tokens: in no error, no file that a job writes, no log, and in nothing that is committed."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from app import ray_cluster as ray_cluster_module
from app.caching.backends import PASSWORD_VARIABLE, RedisBackend
from app.config import Config, PrepareConfig, ServeConfig, TrainConfig, load_config
from app.display.dry_run import show_forecast
from app.errors import UserError

REPOSITORY = Path(__file__).parents[2]
SECRET = "hunter2"

WITH_SECRETS = [
    (TrainConfig, ["data=d", "output=o", f"tracking.uri=http://me:{SECRET}@mlflow:5000"]),
    (TrainConfig, ["data=d", "output=o", f"checkpoints=s3://key:{SECRET}@bucket/run"]),
    (PrepareConfig, ["output=o", f"source=s3://key:{SECRET}@bucket/a.jsonl"]),
    (ServeConfig, ["cache.backend.type=redis", f"cache.backend.url=rediss://:{SECRET}@redis:6379/0"]),
    (ServeConfig, [f"generator.tracking.uri=postgresql://me:{SECRET}@db/mlflow"]),
    (ServeConfig, [f"generator.tracking.uri=postgresql+psycopg://me:ab/{SECRET}@db/mlflow"]),
    (TrainConfig, ["data=d", "output=o", f"tracking.artifacts=sftp://me:{SECRET}@host/artifacts"]),
]


@pytest.mark.parametrize(("kind", "overrides"), WITH_SECRETS)
def test_settings_are_written_down_without_the_passwords_in_them(kind: type[Config], overrides: list[str]) -> None:
    config = load_config(kind, overrides=overrides)
    written = json.dumps(config.model_dump(mode="json"))
    assert SECRET in str(config.model_dump()), "what is to be used is whole"
    assert SECRET not in written and "***" in written


def test_a_dry_run_shows_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    class Forecast:
        config = load_config(TrainConfig, overrides=WITH_SECRETS[0][1])

    with pytest.raises(AttributeError):  # it goes on with what there is not here
        show_forecast(Forecast())
    shown = capsys.readouterr()
    assert "mlflow:5000" in shown.out + shown.err and SECRET not in shown.out + shown.err


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.uri=ftp://me:{SECRET}@host", f"tracking.url=http://me:{SECRET}@host",
        f"tracking=http://me:{SECRET}@host", f"tracking.uri=postgresql://me:{SECRET}@host/db",
        f"workers.count=http://me:{SECRET}@host", f"=http://me:{SECRET}@host",
        f"tracking.uri=ftp://host?password={SECRET}", f"tracking.uri=ftp://host?access_token={SECRET}",
    ],
)  # fmt: skip
def test_a_mistake_is_told_without_the_password_in_it(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, overrides=["data=d", "output=o", override])
    assert SECRET not in str(caught.value)


def test_what_only_looks_like_a_password_is_told() -> None:
    with pytest.raises(UserError, match="max_tokens=-3"):
        raise UserError("max_tokens=-3: must be above 0; see http://host:8000/docs@v1")


def test_redis_takes_its_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, SECRET)
    connection = RedisBackend("redis://redis:6379/0", timeout_s=1)._client.connection_pool.connection_kwargs
    assert connection["password"] == SECRET


@pytest.mark.ray
def test_no_log_and_no_command_line_has_rays_token(ray_cluster: None) -> None:
    @ray.remote
    def work() -> None:
        logging.getLogger("ray").warning("it works")
        print("and prints")

    ray.get(work.remote())
    token = os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray/auth_token").read_text().strip()
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    texts = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert len(token) > 20 and any(texts.values())
    assert not [file.name for file, text in texts.items() if token.encode() in text]
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            commands.append(file.read_bytes())
    assert not any(token.encode() in command for command in commands), "every user of the machine can read these"


def test_the_token_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "auth_token"
    monkeypatch.setattr(ray_cluster_module, "TOKEN_FILE", file)
    ray_cluster_module.keep_token_private()
    assert not file.exists()
    file.write_text("token")
    file.chmod(0o644)
    ray_cluster_module.keep_token_private()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_cluster_of_ones_own_makes_it_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "auth_token"
    monkeypatch.setattr(ray_cluster_module, "TOKEN_FILE", file)

    def as_ray_does(**_: object) -> None:
        file.write_text("token")
        file.chmod(0o644)

    monkeypatch.setattr(ray, "init", as_ray_does)
    ray_cluster_module._connect(None, 1.0)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.ray
def test_a_local_cluster_leaves_no_token_that_others_can_read(ray_cluster: None) -> None:
    file = ray_cluster_module.TOKEN_FILE
    assert not file.exists() or stat.S_IMODE(file.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("in_git", [True, False])
def test_the_scan_for_secrets_finds_one(tmp_path: Path, in_git: bool) -> None:
    """As `make check` runs it, in a folder of its own."""
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    binaries = f"BIN={Path(sys.executable).parent}"
    # what the target depends on, an installation, is there
    command = ["make", "--file", tmp_path / "Makefile", "--assume-old=.venv/.dev", binaries, "secrets"]

    def scan() -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=100, text=True)

    if in_git:
        subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True)
    (tree / "clean.py").write_text(f"digest = '{hashlib.sha256(b'a').hexdigest()}'\n")
    clean = scan()
    assert clean.returncode == 0, clean.stdout + clean.stderr
    # in two pieces, else the scan would find it here
    (tree / "settings.py").write_text('token = "ghp_' + '1B2c3D4e5F6g7H8i9J0kLmNoPqRsTuVwXyZ3"\n')
    found = scan()
    assert found.returncode != 0 and "settings.py" in found.stdout and "1B2c3D4e" not in found.stdout
