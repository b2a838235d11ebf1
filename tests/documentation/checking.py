"""What can be told of a command without running it: whether the program would take it."""

import functools
import importlib.util
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import jsonschema
import typer

import app.cli
import app.config
from app.config import ApplicationConfig
from app.errors import UserError
from tests.documentation.reading import ELLIPSIS, REPOSITORY, Command

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


LEFT_OUT = ("MissingParameter", "BadOptionUsage", "BadParameter")
"""How the parser says that something is not there."""


def check(command: Command) -> bool:
    """Whether the command is of a kind that can be checked; if it is, it is right.

    Raises:
        AssertionError: the program would refuse it.
    """
    words = [command.words[0].removeprefix(".venv/bin/"), *command.words[1:]]
    for beginning, checker in CHECKERS.items():
        parts = beginning.split()
        if words[: len(parts)] == parts:
            try:
                checker(words[len(parts) :], command)
            except Exception as error:
                raise AssertionError(f"{command}: {error}") from error
            return True
    return False


def check_pacos(words: Sequence[str], command: Command) -> None:
    """The parser accepts the options, and each key=value is a setting of that command with a value that it takes."""
    if words[0] == ELLIPSIS:
        return
    is_partial = not command.is_whole or any(ELLIPSIS in word for word in words)
    # In the text stand also [key=VALUE] for what may be left out, and NAME for a name.
    given = [re.sub(r"^\[(.*=.*)\]$", r"\1", word) for word in words] if is_partial else list(words)
    given = [word for word in given if word != ELLIPSIS and not (is_partial and re.fullmatch("[A-Z]+", word))]
    with _only_loading(is_partial):
        try:
            typer.main.get_command(app.cli.cli).main(given, prog_name="pacos", standalone_mode=False)
        except Exception as error:
            if not (is_partial and type(error).__name__ in LEFT_OUT):
                raise


@contextmanager
def _only_loading(is_partial: bool) -> Iterator[None]:
    """Commands load their settings, and do nothing with them."""

    def load(command: str, schema: str, overrides: list[str] | None, file: str | None, **options: Any) -> None:
        config = getattr(app.config, schema)
        elided = [override for override in overrides or () if ELLIPSIS in override]
        whole = [override for override in overrides or () if ELLIPSIS not in override]
        path = None if file is None or file == "FILE" else str(REPOSITORY / file)
        for override in elided:
            _load(config, [override], None, is_partial=True)
        _load(config, whole, path, is_partial=is_partial)

    with patch("app.cli._run", load), patch("app.commands.cluster_up"):
        yield


def _load(config: Any, overrides: list[str], file: str | None, *, is_partial: bool) -> None:
    try:
        app.config.load_config(config, file=file, overrides=overrides)
    except UserError as error:
        lines = str(error).splitlines()
        left_out = [": required; add it" in line or (ELLIPSIS in line and "unknown key" not in line) for line in lines]
        if not (is_partial and all(left_out)):
            raise


def check_job_script(words: Sequence[str], command: Command) -> None:
    script = REPOSITORY / words[0]
    assert script.is_file(), f"there is no {words[0]}"
    main = re.search(r'main\("(\w+)"\)', script.read_text())
    if main:
        check_pacos([main[1], *words[1:]], command)
    else:
        _check_options([script], words[1:])


def check_module(words: Sequence[str], command: Command) -> None:
    """`python -m`: there is such a module, and it has every option."""
    if words[0] == "tune.sweep":
        check_pacos(["sweep", *words[1:]], command)
        return
    if words[0] == "pytest":
        _check_pytest(words[1:])
        return
    spec = importlib.util.find_spec(words[0])
    assert spec, f"there is no module {words[0]}"
    package = [Path(folder, "__main__.py") for folder in spec.submodule_search_locations or ()]
    assert all(file.is_file() for file in package), f"{words[0]} is a package that cannot be run"
    if words[0].startswith("tests."):  # hands what it is given to pytest
        _check_pytest(words[1:])
    else:
        _check_options(package or [Path(str(spec.origin))], words[1:])


def _check_pytest(words: Sequence[str]) -> None:
    """Files are there, and long options are among those that the suite adds; short ones are pytest's."""
    _check_options([REPOSITORY / "tests/conftest.py"], [word for word in words if word[:2] == "--"], adding="addoption")
    files = [word for word in words if word.endswith(".py")]
    assert all((REPOSITORY / file).is_file() for file in files), f"not all of {files} are there"


def _check_options(sources: Sequence[Path], words: Sequence[str], *, adding: str = "add_argument") -> None:
    text = "".join(source.read_text() for source in sources)
    for option in (word.split("=")[0] for word in words if word.startswith("-")):
        assert re.search(rf"{adding}\(\s*[^)]*\"{option}\"", text), f"no option {option}"


def check_submitted(words: Sequence[str], command: Command) -> None:
    """`ray job submit … -- COMMAND`: our part of it."""
    rest = tuple(words[list(words).index("--") + 1 :]) if "--" in words else ()
    if set(rest) - {ELLIPSIS}:
        assert check(Command(command.where, rest, is_whole=command.is_whole)), f"{command}: what is submitted?"


def check_make(words: Sequence[str], command: Command) -> None:
    targets = re.findall(r"(?m)^([a-z]+):", (REPOSITORY / "Makefile").read_text())
    named = [word for word in words if "=" not in word and word != "..."]
    assert set(named) <= set(targets), f"{command}: the Makefile has {targets}"


def check_pip(words: Sequence[str], command: Command) -> None:
    """Extras of ours exist."""
    for word in words:
        extras = re.fullmatch(r"(?:pacos|\.)\[(.+)\]", word)
        assert not extras or set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"]), command
        if word.endswith(".txt"):
            assert (REPOSITORY / word).is_file(), command


def check_export(words: Sequence[str], command: Command) -> None:
    assert re.match(r"[A-Za-z_]\w*=", words[0]), f"{command}: no variable is set"


def check_source(words: Sequence[str], command: Command) -> None:
    assert list(words) == [".venv/bin/activate"], f"{command}: the Makefile makes .venv"


def check_deployed(words: Sequence[str], command: Command) -> None:
    from app.serving.check import check_deploy_file

    if words and words[0] != ELLIPSIS and words[0].endswith(".yaml"):
        check_deploy_file(str(REPOSITORY / words[0]))


def check_curl(words: Sequence[str], command: Command) -> None:
    """The route is there for that method, and a JSON body is one that it takes."""
    (url,) = [word for word in words if word.startswith("http://")]
    method = words[words.index("-X") + 1].lower() if "-X" in words else None
    is_post = {"-d", "-F"} & set(words)
    method = method or ("post" if is_post else "get")
    path = re.sub(r"\?.*", "", url.removeprefix("http://127.0.0.1:8000"))
    schema = _api()
    route = next((route for route in schema["paths"] if re.fullmatch(re.sub(r"{\w+}", "[^/]+", route), path)), None)
    assert route and method in schema["paths"][route], f"{command}: no route {method} {path}"
    if "-d" in words:
        body = json.loads(words[words.index("-d") + 1])
        wanted = schema["paths"][route][method]["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate(body, {**wanted, "components": schema["components"]})


@functools.cache
def _api() -> dict[str, Any]:
    from app.serving.ingress import create_api

    config = ApplicationConfig.model_validate({"retriever": {"documents": "/documents"}})
    answering: Any = SimpleNamespace(config=config)
    return create_api(answering).openapi()


CHECKERS: dict[str, Callable[[Sequence[str], Command], None]] = {
    "pacos": check_pacos,
    "python -m": check_module,
    "python": check_job_script,
    "ray job submit": check_submitted,
    "serve deploy": check_deployed,
    "make": check_make,
    "pip install": check_pip,
    "curl": check_curl,
    "export": check_export,
    "source": check_source,
    "echo": lambda words, command: None,
}
