"""GitHub's workflows and what a release is made of: checked as far as they can be without GitHub."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import app

REPOSITORY = Path(__file__).parents[2]
WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yaml"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
BIN = Path(sys.executable).parent


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in WORKFLOWS:
        for name, job in read(file)["jobs"].items():
            yield f"{file.stem}.{name}", job


def commands() -> str:
    return "\n".join(step["run"] for _, job in jobs() for step in job["steps"] if "run" in step)


def schema_faults(*files: Path) -> str:
    """By GitHub's schema for workflows, as SchemaStore has it, and that each job has a timeout."""
    found = ""
    for schema in ("vendor.github-workflows", "custom.github-workflows-require-timeout"):
        result = subprocess.run(
            [BIN / "check-jsonschema", "--builtin-schema", schema, *files], capture_output=True, text=True
        )
        found += "" if result.returncode == 0 else result.stdout + result.stderr
    return found


def security_faults(*files: Path) -> str:
    """What zizmor finds without asking GitHub: injections, too many permissions, actions that are not pinned, …"""
    result = subprocess.run([BIN / "zizmor", "--offline", "--no-progress", *files], capture_output=True, text=True)
    return "" if result.returncode == 0 else result.stdout


def test_workflows_are_valid_and_each_job_has_a_timeout(tmp_path: Path) -> None:
    assert len(WORKFLOWS) == 3
    assert schema_faults(*WORKFLOWS) == ""
    for number, (right, wrong) in enumerate([("runs-on:", "run-on:"), ("    timeout-minutes: 30\n", "")]):
        changed = tmp_path / f"{number}.yaml"
        changed.write_text(WORKFLOWS[0].read_text().replace(right, wrong))
        assert schema_faults(changed), wrong


def test_workflows_give_no_more_rights_than_are_needed(tmp_path: Path) -> None:
    assert security_faults(*WORKFLOWS) == ""
    assert all(read(file)["permissions"] == {} for file in WORKFLOWS)
    writing = {name for name, job in jobs() if job["permissions"] != {"contents": "read"}}
    assert writing == {"release.github", "release.pypi"}
    changed = tmp_path / "changed.yaml"
    for right, wrong in [
        ("  pull_request:\n", "  pull_request_target:\n"),
        ("    permissions:\n      contents: read\n", "    permissions: write-all\n"),
        ("actions/checkout@08c6903cd8c0fde910a37f88322edcfb5dd907a8", "somebody/checkout@v5"),
        ("run: make check PYTHON=python", "run: echo ${{ github.head_ref }}"),
    ]:
        text = WORKFLOWS[0].read_text()
        assert right in text
        changed.write_text(text.replace(right, wrong))
        assert security_faults(changed), wrong


def test_actions_are_pinned_by_commit_one_commit_each() -> None:
    pins: dict[str, set[str]] = {}
    for file in WORKFLOWS:
        lines = [line for line in file.read_text().splitlines() if re.search(r"\buses:", line)]
        for line in lines:
            pin = re.search(r"uses: ([\w./-]+)@([0-9a-f]{40}) # v\d+\.\d+\.\d+$", line)
            assert pin, line
            pins.setdefault(pin[1], set()).add(pin[2])
    assert pins and all(len(commits) == 1 for commits in pins.values()), pins


def test_every_python_that_the_project_names_is_tested() -> None:
    named = {
        line.rsplit(" ", 1)[1]
        for line in PROJECT["classifiers"]
        if line.startswith("Programming Language :: Python :: ")
    }
    allowed = {f"3.{minor}" for minor in range(40) if SpecifierSet(PROJECT["requires-python"]).contains(f"3.{minor}")}
    matrices = {name: set(job["strategy"]["matrix"]["python"]) for name, job in jobs() if "strategy" in job}
    assert set(matrices) == {"ci.test", "release.try"}
    assert all(matrix == named == allowed for matrix in matrices.values()), (matrices, named, allowed)


def test_workflows_run_what_a_developer_runs() -> None:
    targets = set(re.findall(r"(?m)^([a-z]+):", (REPOSITORY / "Makefile").read_text()))
    made = set(re.findall(r"\bmake ([a-z]+)", commands()))
    assert {"check", "test", "generated", "docs", "audit", "chaos"} <= made
    assert made <= targets, f"not in the Makefile: {made - targets}"
    scripts = set(re.findall(r"\.ci/[\w-]+", commands()))
    assert scripts == {".ci/try-wheel", ".ci/release-notes"}
    for script in scripts:
        assert os.access(REPOSITORY / script, os.X_OK)
        subprocess.run(["bash", "-n", REPOSITORY / script], check=True)


def test_programs_without_which_tests_are_skipped_are_installed_where_they_run() -> None:
    files = (REPOSITORY / "tests").rglob("*.py")
    missed = {name for file in files for name in re.findall(r'skip\("([\w-]+) is not on PATH', file.read_text())}
    assert missed == {"redis-server", "prometheus", "promtool"}
    for job in ("ci.test", "nightly.chaos"):
        *before, last = [step["run"] for step in dict(jobs())[job]["steps"] if "run" in step]
        assert last.startswith("make ")
        (packages,) = re.findall(r"apt-get install --no-install-recommends --yes (.*)", "\n".join(before))
        assert missed - {"promtool"} <= set(packages.split()), job  # which comes with prometheus


def test_secrets_and_known_flaws_are_looked_for_at_every_change() -> None:
    def does(target: str) -> str:
        """What make would run, the installations taken for done."""
        done = [f"--assume-old=.venv/.{name}" for name in ("created", "runtime", "dev", "audit")]
        command = ["make", "--dry-run", *done, target]
        return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout

    assert "kingfisher scan" in does("check")
    assert "pip-audit" in does("audit") and "kingfisher scan . --branch HEAD" in does("audit")
    steps = [step.get("run", "") for name, job in jobs() if name.startswith("ci.") for step in job["steps"]]
    for target in ("check", "audit"):
        assert any(re.search(rf"\bmake {target}\b", step) for step in steps), target


def test_a_release_waits_for_the_wheel_to_be_tried_and_keeps_no_token() -> None:
    release = read(REPOSITORY / ".github/workflows/release.yaml")["jobs"]
    assert (release["try"]["needs"], release["github"]["needs"], release["pypi"]["needs"]) == ("build", "try", "github")
    assert release["pypi"]["environment"] == "pypi" and release["pypi"]["permissions"] == {"id-token": "write"}
    assert not any("secrets." in file.read_text() for file in WORKFLOWS)


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    """The files that a release is told from, with a date for the version that is in the code."""
    for name in (".ci/release-notes", "app/__init__.py", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(
        changelog.read_text().replace(f"## [{app.__version__}] - Unreleased", f"## [{app.__version__}] - 2027-01-31")
        + "\n## [0.0.1] - 2020-01-01\n\nOlder.\n"
    )
    return tmp_path


def notes(folder: Path, tag: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([folder / ".ci/release-notes", tag], capture_output=True, text=True)


def test_a_releases_notes_are_its_section_of_the_changelog(dated: Path) -> None:
    told = notes(dated, f"v{app.__version__}")
    assert told.returncode == 0, told.stderr
    assert "### Added" in told.stdout and "Older." not in told.stdout and "## [" not in told.stdout
    wrong = notes(dated, "v9.9.9")
    assert wrong.returncode == 1 and "another version" in wrong.stderr
    (dated / "CHANGELOG.md").write_text("# Changelog\n\n## [0.1.0] - Unreleased\n")
    undated = notes(dated, f"v{app.__version__}")
    assert undated.returncode == 1 and "no section" in undated.stderr


def test_the_changelog_has_a_section_for_the_version_in_the_code() -> None:
    headings = re.findall(r"(?m)^## \[(.+?)\] - (\S+)$", (REPOSITORY / "CHANGELOG.md").read_text())
    assert headings[0][0] == app.__version__
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in headings[1:])
