"""Where runs and models are recorded: the settings of `tracking:`, and of the commands on the model registry."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from app.config.base import Config, Masked
from app.errors import masked

_SERVERS = ("http", "https", "databricks")
_DATABASES = ("postgresql", "mysql", "mssql")
_MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9 ._-]*"


def _tracking_uri(uri: str) -> str:
    if uri in ("auto", "none", "databricks"):
        return uri
    scheme, colon, rest = uri.partition(":")
    if colon and scheme.partition("+")[0] in (*_SERVERS, *_DATABASES):
        return uri
    if scheme == "sqlite" and rest.startswith("///") and len(rest) > 3:
        return f"sqlite:///{Path(rest[3:]).expanduser().absolute()}"
    if scheme == "file" and rest:
        return Path(re.sub("^//", "", rest)).expanduser().absolute().as_uri()
    raise ValueError("not a tracking URI; one of auto, none, sqlite:///FILE, http(s)://HOST:PORT, file:FOLDER")


def _registered_name(name: str) -> str:
    if not re.fullmatch(_MODEL_NAME, name):
        raise ValueError("a registered model's name has letters, digits, spaces, dots, dashes and underscores")
    return name


TrackingUri = Annotated[str, AfterValidator(_tracking_uri), Masked]
"""An MLflow tracking URI."""
RegisteredName = Annotated[str, AfterValidator(_registered_name)]


class StoreConfig(Config):
    """An MLflow, where models are registered."""

    uri: TrackingUri = "auto"
    """`sqlite:///FILE`, `http://HOST:PORT`, `file:FOLDER`; auto is MLFLOW_TRACKING_URI where that is set, else the
    SQLite file runs/mlflow.db."""


class TrackingConfig(StoreConfig):
    """The MLflow run of a job."""

    uri: TrackingUri = "auto"
    """`sqlite:///FILE`, `http://HOST:PORT`, `file:FOLDER`, or none; auto is MLFLOW_TRACKING_URI where that is set, else
    mlflow.db in the folder `runs` above `output`, or without such a folder beside `output`."""
    experiment: Annotated[str, Field(min_length=1)] = "pacos"
    """Made if need be."""
    run_name: str | None = None
    """None takes the name of the run's folder."""
    artifacts: Annotated[str, Masked] | None = None
    """Folder or URI for the artifacts of a new experiment; none leaves it to the server, or takes a folder beside the
    SQLite file."""

    @model_validator(mode="after")
    def _check(self) -> "TrackingConfig":
        scheme = self.uri.partition(":")[0].partition("+")[0]
        if scheme in _DATABASES and self.artifacts is None:
            raise ValueError(f"uri={masked(self.uri)!r} holds no files; say with artifacts=… where they go")
        return self


class PromoteConfig(Config):
    """`pacos promote`: which version of a registered model is in production."""

    name: RegisteredName
    version: Annotated[int, Field(gt=0)]
    alias: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")] = "production"
    """Serving reads `models:/NAME@ALIAS`."""
    tracking: StoreConfig = StoreConfig()


class ModelsConfig(Config):
    """`pacos models`: what is registered."""

    tracking: StoreConfig = StoreConfig()
