"""The package as `pip install` leaves it: built, installed into an environment of its own, used far from the checkout.

The new environment sees the dependencies of this one, so that nothing is downloaded, but not this one's pacos.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import app

REPOSITORY = Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the source distribution, so that this has all that it needs as well."""
    source = tmp_path_factory.mktemp("source")
    for name in ("app", "tune", "configs", "examples"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", source], check=True, capture_output=True)
    (made,) = (source / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, whose files cannot be written."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    venv.create(folder)
    python = folder / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A .pth file adds a folder and does not read that folder's own .pth files: no editable pacos comes along.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for path in packages.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def run(environment: Path, cwd: Path, program: str, *args: str) -> str:
    """What it prints; nothing of this process's Python and Ray reaches it, and its cache is in `cwd`."""
    hidden = ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    variables |= {"XDG_CACHE_HOME": str(cwd / "cache"), "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [environment / "bin" / program, *args]
    result = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_everything_below_app_and_tune_is_in_the_wheel(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        str(file.relative_to(REPOSITORY))
        for package in ("app", "tune")
        for file in (REPOSITORY / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert ours <= inside, sorted(ours - inside)
    strangers = {name for name in inside - ours if not name.startswith(f"pacos-{app.__version__}.")}
    assert not strangers


def test_its_version_is_the_one_in_the_code(wheel: Path, environment: Path, elsewhere: Path) -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert wheel.name == f"pacos-{app.__version__}-py3-none-any.whl"
    assert run(environment, elsewhere, "pacos", "--version") == f"{app.__version__}\n"
    asked = "from importlib.metadata import version; print(version('pacos'))"
    assert run(environment, elsewhere, "python", "-c", asked) == f"{app.__version__}\n"


def test_it_says_that_its_weights_are_not_for_commercial_use(environment: Path, elsewhere: Path) -> None:
    asked = "from importlib.metadata import metadata; print(metadata('pacos')['License-Expression'])"
    said = run(environment, elsewhere, "python", "-c", asked).strip().split(" AND ")
    cards = [card.read_text() for card in (REPOSITORY / "app/assets").glob("*/README.md")]
    assert cards
    for name in ("CC BY-NC 4.0", "CC BY-SA 3.0"):
        assert all(name in card for card in cards)
        assert name.replace(" ", "-") in said


def test_the_installed_package_is_used_and_knows_the_embedded_model(environment: Path, elsewhere: Path) -> None:
    where = run(environment, elsewhere, "python", "-c", "import app, tune; print(app.__file__, tune.__file__)")
    assert all(file.startswith(str(environment)) for file in where.split())
    assert "quickstart" in run(environment, elsewhere, "pacos", "--help")
    described = run(environment, elsewhere, "pacos", "describe", "embedded", "method.type=lora")
    assert "221,184 of 11,082,240 weights train" in described


def test_the_engine_generates_and_its_kernels_are_compiled_outside_of_the_package(
    environment: Path, elsewhere: Path
) -> None:
    script = """
from app.assets import EMBEDDED_BASE
from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.models.checkpoints import load_decoder
engine = Engine(load_decoder(EMBEDDED_BASE), max_batch_size=4)
engine.add_request([10, 11, 12], Sampling(max_tokens=8, ignore_eos=True))
tokens = 0
while engine.has_work:
    tokens += len(engine.step())
print(tokens)
"""
    before = sorted(environment.rglob("*"))
    assert run(environment, elsewhere, "python", "-c", script).split()[-1] == "8"
    assert sorted(environment.rglob("*")) == before, "something was written beside the installed code"
    if shutil.which("cc"):
        assert list((elsewhere / "cache/pacos").glob("*.so"))


def test_quickstart_finds_the_examples_that_came_with_it(environment: Path, elsewhere: Path) -> None:
    script = """
from app.config import QuickstartConfig
from app.quickstart import _with_carried_files
config = _with_carried_files(QuickstartConfig())
print(config.instructions, config.documents, config.train, sep="\\n")
"""
    instructions, documents, train = map(Path, run(environment, elsewhere, "python", "-c", script).split())
    for carried, original in (
        (instructions, "examples/instructions.jsonl"),
        (train, "configs/quickstart.yaml"),
        *((file, f"examples/documents/{file.name}") for file in documents.iterdir()),
    ):
        assert carried.is_relative_to(environment)
        assert carried.read_bytes() == (REPOSITORY / original).read_bytes()
    assert len(list(documents.iterdir())) == len(list((REPOSITORY / "examples/documents").iterdir()))


@pytest.mark.ray
def test_a_job_runs_on_workers_that_import_the_installed_package(environment: Path, elsewhere: Path) -> None:
    (elsewhere / "prompts.txt").write_text("What do alpacas eat?\nName a colour.\n")
    run(environment, elsewhere, "pacos", "generate", "prompts.txt", "output=answers.jsonl", "max_tokens=8")
    answers = [json.loads(line) for line in (elsewhere / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 and all(answer["answer"] for answer in answers), answers
