"""Every command in the documents is run by a test, or checked as far as it goes without running it, or says before its
block why it cannot be run here: `<!-- not run: needs a cloud -->`. There is no fourth kind."""

import ast
import importlib
import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from app.config import SweepConfig, validate
from tests.documentation.checking import check
from tests.documentation.reading import DOCUMENTS, REPOSITORY, Block, Command, blocks, commands, commands_of

RUN_BY = {
    r"make quickstart": "tests/test_quickstart.py::test_quickstart_goes_through_every_stage pacos quickstart",
    r"make (test|check|docs|generated)": ".github/workflows/ci.yaml",
    r"make manifests": "tests/deployment/test_generated_manifests.py::test_the_committed manifests()",
    r"pacos cluster up .*": "tests/test_cluster_up.py::test_tasks_run_on_both_workers",
    r"ray get-auth-token --generate": "app/local_cluster.py get-auth-token --generate",  # for tests/test_cluster_up.py
    r"ray start --head": "tests/test_cluster.py::test_serve_deploy_answers_as_transformers_does",
    r"serve (deploy .*|status)": "tests/test_cluster.py::test_serve_deploy_answers_as_transformers_does",
    r"docker build .*--target cpu .*": ".github/workflows/ci.yaml",
}
"""Commands that are run, as they stand or with other values, by continuous integration or by a test, of whose name the
beginning is enough. Their first words stand in that file; where others do the same, those are told after it."""


def runner(command: Command) -> str | None:
    text = " ".join(command.words)
    return next((where for pattern, where in RUN_BY.items() if re.fullmatch(pattern, text)), None)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(REPOSITORY)))
def test_every_command_is_run_or_checked_or_says_why_not(document: Path) -> None:
    faults = []
    for command in commands_of(document):
        try:
            is_known = check(command)
        except AssertionError as fault:
            faults.append(str(fault))
            continue
        if not (is_known or runner(command) or command.not_run or not command.is_whole):
            faults.append(f"{command}: neither run by a test, nor checked, nor marked <!-- not run: reason -->")
    assert not faults, "\n".join(faults)


def test_what_is_said_to_be_run_is_run() -> None:
    for pattern, where in RUN_BY.items():
        found = [command for command in commands() if re.fullmatch(pattern, " ".join(command.words))]
        assert found, f"no document has {pattern!r}"
        place, *others = where.split()
        file, _, test = place.partition("::")
        text = (REPOSITORY / file).read_text()
        assert f"def {test}" in text or not test, f"{file} has no test {test!r}"
        for command in found:
            words = others or itertools.takewhile(re.compile("[a-z][a-z-]*").fullmatch, command.words)
            between = r'",\s*"' if file.endswith(".py") else " "  # a list of Python, or a line of a shell
            wanted = between.join(map(re.escape, words))
            assert re.search(wanted, text), f"{command}: {file} has no {wanted!r}"


def test_a_mark_says_something_that_is_needed() -> None:
    for document in DOCUMENTS:
        for block in (block for block in blocks(document) if block.not_run):
            of_block = [command for command in commands_of(document) if command.not_run == block.not_run]
            assert any(not runner(command) and not check(command) for command in of_block), (
                f"{document.name}:{block.line}: all of it is run or checked; the mark is not needed"
            )


def test_commands_stand_in_blocks_that_say_so() -> None:
    for document in DOCUMENTS:
        for block in blocks(document):
            is_typed = re.search(r"(?m)^(\$ |(pacos|ray|serve|make|pip|python|curl|docker|kubectl) )", block.text)
            assert not is_typed or block.language in ("bash", "console"), f"{document.name}:{block.line}"


@pytest.mark.parametrize(
    "typed",
    [
        "pacos train metod.rank=3 data=a output=b",
        "pacos train --confg FILE",
        "pacos trian data=a output=b",
        "pacos train data=a",
        "pacos train --config configs/absent.yaml data=a output=b",
        "pacos serve generator.deltas=…  retriever.indx=…",
        "python jobs/absent.py",
        "python jobs/train.py data=a outptu=b",
        "python -m tune.sweep outpt=a",
        "python -m benchmarks.data --sourc a",
        "python -m benchmarks.absent",
        "ray job submit --working-dir . -- python jobs/train.py dat=a output=b",
        "make quickstrat",
        "pip install 'pacos[absent]'",
        "curl -s http://127.0.0.1:8000/v1/serach -d '{}'",
        'curl -s http://127.0.0.1:8000/v1/search -d \'{"quary": "hay"}\'',
    ],
)
def test_a_rotten_command_is_noticed(typed: str) -> None:
    with pytest.raises(AssertionError):
        check(Command("here", tuple(shlex.split(typed))))


def code(language: str) -> list[Block]:
    return [block for document in DOCUMENTS for block in blocks(document) if block.language == language]


def test_python_in_the_documents_is_python_and_finds_what_it_imports() -> None:
    assert code("python")
    for block in code("python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                where = f"{block.document.name}:{block.line}: {node.module}"
                assert importlib.util.find_spec(node.module), where
                if node.module.startswith("app."):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names), where


def test_the_sweeps_in_the_documents_are_sweeps() -> None:
    sweep, population = [yaml.safe_load(block.text) for block in code("yaml") if block.document.name == "sweeps.md"]
    validate(SweepConfig, sweep)
    validate(SweepConfig, sweep | population)  # what of the first is another
