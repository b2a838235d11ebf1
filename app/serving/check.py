"""A file for `serve deploy`, looked at before anything is deployed. Serve itself drops unknown keys without a word."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from app.config import ApplicationConfig, ServeConfig, validate
from app.errors import UserError
from app.serving.launch import check_folders

IMPORT_PATH = "app.serving.application:build"
DEPLOYMENTS = ("ingress", "generator", "retriever", "documents", "limiter")
_SINGLE = {"limiter": "counts for all", "documents": "is the one that writes"}


def is_deploy_file(file: str) -> bool:
    """Whether it is for `serve deploy`, and not for `pacos serve`.

    Raises:
        UserError: it cannot be read.
    """
    return "applications" in _read(file)


def check_deploy_file(file: str) -> list[str]:
    """The names of the applications of ours in `file`.

    Raises:
        UserError: a key that nobody knows, a wrong value, a folder that is not there, or none of the applications is
            ours.
    """
    from ray.serve.schema import ServeDeploySchema

    values = _read(file)
    try:
        for where, policy in _policies(values):  # Serve's own schema imports them, and fails with a traceback
            _check_policy(policy, where=where)
        _check_known(ServeDeploySchema.model_validate(values), values, where="")
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    ours = [application for application in values["applications"] if application.get("import_path") == IMPORT_PATH]
    if not ours:
        raise UserError(f"{file}: no application has import_path: {IMPORT_PATH}")
    for application in ours:
        name = application.get("name", "default")
        try:
            config = validate(ApplicationConfig, application.get("args") or {})
            check_folders(ServeConfig.model_validate(config.model_dump()))
            for deployment in application.get("deployments") or ():
                _check_deployment(deployment)
        except UserError as error:
            raise UserError(f"{file}: application {name!r}: {error}") from None
    return [application.get("name", "default") for application in ours]


def _check_deployment(values: dict[str, Any]) -> None:
    from ray.serve.config import AutoscalingConfig

    name = values["name"]
    if name not in DEPLOYMENTS:
        raise UserError(f"deployments: {name!r} is none of {', '.join(DEPLOYMENTS)}")
    scaling = values.get("autoscaling_config")
    if name in _SINGLE and (scaling or values.get("num_replicas", 1) != 1):
        raise UserError(f"deployments.{name}: it {_SINGLE[name]} and must stay one replica; leave its number out")
    if isinstance(scaling, dict):
        where = f"deployments.{name}.autoscaling_config"
        _refuse_unknown(scaling, set(AutoscalingConfig.model_fields), where=where)
        try:
            AutoscalingConfig(**scaling)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"deployments.{name}.autoscaling_config.{where}: {first['msg']}") from None


def _policies(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Each autoscaling policy with its place; what has another form than it should is left to the checks to come."""
    found = []
    for application in _dicts(values.get("applications")):
        for deployment in _dicts(application.get("deployments")):
            scaling = deployment.get("autoscaling_config")
            if isinstance(scaling, dict) and "policy" in scaling:
                where = f"deployments.{deployment.get('name')}.autoscaling_config.policy"
                found.append((where, scaling["policy"]))
    return found


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _check_policy(values: Any, *, where: str) -> None:
    """An autoscaling policy is imported, and made as Serve's controller will make it."""
    import inspect

    from ray.serve.config import AutoscalingPolicy

    if not isinstance(values, dict):
        raise UserError(f"{where}={values!r}: give policy_function and policy_kwargs")
    _refuse_unknown(values, set(AutoscalingPolicy.model_fields), where=where)
    arguments = values.get("policy_kwargs") or {}
    try:
        policy = AutoscalingPolicy(**values).get_policy()
    except (ImportError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}.policy_function={values.get('policy_function')!r}: {reason}") from None
    known = set(inspect.signature(policy).parameters) if inspect.isclass(policy) else set()  # a function takes none
    _refuse_unknown(arguments, known, where=f"{where}.policy_kwargs")
    if inspect.isclass(policy):
        try:
            policy(**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}.policy_kwargs: {error}") from None


def _check_known(model: BaseModel, values: Any, *, where: str) -> None:
    """Refuse keys of `values` that `model`, which was read from it, has no field for."""
    if not isinstance(values, dict):
        return
    _refuse_unknown(values, set(type(model).model_fields), where=where)
    for key, value in values.items():
        inside = getattr(model, key)
        place = f"{where}.{key}" if where else key
        if isinstance(inside, BaseModel):
            _check_known(inside, value, where=place)
        elif isinstance(inside, list):
            for number, (part, given) in enumerate(zip(inside, value, strict=True)):
                if isinstance(part, BaseModel):
                    _check_known(part, given, where=f"{place}.{number}")


def _refuse_unknown(values: dict[str, Any], known: set[str], *, where: str) -> None:
    import difflib

    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"unknown key {where + '.' if where else ''}{key}{hint}")


def _read(file: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file!r} holds no settings")
    return values
