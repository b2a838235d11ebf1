"""Which MLflow a setting means, and a client to it. Knows no run and no model."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse
from urllib.request import url2pathname

from app.atomic import make_folder
from app.errors import UserError, masked

if TYPE_CHECKING:  # importing it takes more than a second
    from mlflow.tracking import MlflowClient

_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its own seven take minutes to tell that nobody answers
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def tracking_uri(uri: str, *, output: str | None = None) -> str:
    """What `auto` means for the run in `output`, or for a command that has no run; other URIs as they are.

    One SQLite file for all runs under a folder `runs`: runs are compared with each other, and models are registered by
    one name.
    """
    if uri != "auto":
        return uri
    if from_environment := os.environ.get("MLFLOW_TRACKING_URI"):
        return from_environment
    folder = Path("runs").absolute() if output is None else _folder_of_runs(Path(output))
    return f"sqlite:///{folder / 'mlflow.db'}"


def _folder_of_runs(output: Path) -> Path:
    return next((folder for folder in output.parents if folder.name == "runs"), output.parent)


def sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def local_folder(artifact_uri: str) -> Path | None:
    """The folder that `artifact_uri` is on this machine's disks, None where it lies in a store."""
    parsed = urlparse(artifact_uri)
    return Path(url2pathname(parsed.path)) if parsed.scheme in ("", "file") else None


def open_store(uri: str, *, create: bool = False) -> "MlflowClient":
    """A client, whose store answers; `create` makes a SQLite file that is not there.

    Raises:
        UserError: there is nothing, or it does not answer.
    """
    if uri == "none":
        raise UserError("tracking.uri='none' turns MLflow off; name the one that has the registry")
    file = sqlite_file(uri)
    if file is not None:
        if not create and not file.is_file():
            raise UserError(f"tracking.uri={uri!r}: no such file; name the MLflow of your runs with tracking.uri=…")
        make_folder(file.parent)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if uri.startswith("file:"):  # in maintenance; MLflow wants to be told that this is known
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    with told_as_mistakes(uri):
        from mlflow.tracking import MlflowClient

        for chatty in ("mlflow", "alembic"):  # a database that is made or migrated is no warning
            logging.getLogger(chatty).setLevel(logging.ERROR)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def told_as_mistakes(uri: str) -> Iterator[None]:
    """What the store refuses, or that it does not answer, as one line with the setting's name.

    Raises:
        UserError: whatever goes wrong in the block: a store is outside of the program, and fails in many ways.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"tracking.uri={masked(uri)!r}: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """An error's first line, without passwords."""
    lines = masked(str(error)).strip().splitlines()
    return f"{lines[0] if lines else type(error).__name__}"[:300]
