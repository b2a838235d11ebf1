"""YAML file + `key=value` overrides -> one validated config. Every mistake becomes a `UserError`."""

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from app.config.base import Config
from app.errors import UserError

ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(schema: type[ConfigT], *, file: str | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `file` (optional), apply dotted `key=value` overrides in order, validate.

    Raises:
        UserError: naming the key, the value and the remedy.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    written = _read_yaml(file) if file else {}
    where = file or "overrides"
    try:
        merged = OmegaConf.create(written)
        for override in overrides:
            where = f"override {override!r}"
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise UserError(f"{where} is not of the form key=value")
            OmegaConf.update(merged, key, value if _is_text(schema, key) else _parse_value(value))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    return validate(schema, values, origin=file)


def validate(schema: type[ConfigT], values: Any, *, origin: str | None = None) -> ConfigT:
    """Check plain `values` against `schema`; `origin` is named in the message."""
    from pydantic import ValidationError

    try:
        return schema.model_validate(_over_defaults(schema, values))
    except ValidationError as error:
        lines = [_explain(schema, item) for item in error.errors()]
        where = f"{origin}: " if origin else ""
        raise UserError("\n".join(where + line for line in lines)) from None


def _read_yaml(file: str) -> dict[str, Any]:
    import yaml

    path = Path(file)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config file {file} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config file {file} must hold key: value pairs, not a {type(values).__name__}")
    return values


def _is_text(schema: type[Config], key: str) -> bool:
    """Whether the setting is a string, which is taken as it stands: `question=yes` is no truth value."""
    *path, name = key.split(".")
    models = [schema]
    for part in path:
        models = [inner for model in models for inner in _nested(model, part)]
    fields = [model.model_fields[name] for model in models if name in model.model_fields]
    return any(field.annotation is str for field in fields)


def _parse_value(text: str) -> Any:
    """As YAML reads it: numbers, true, null, [lists] and {maps}; anything else is text."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return _parse_exponent(text) if isinstance(value, str) else value if text else ""


def _parse_exponent(text: str) -> float | str:
    # YAML 1.1 takes 1e-3 for text, because it has no dot
    try:
        return float(text) if text[:1] in "+-.0123456789" else text
    except ValueError:
        return text


def _over_defaults(schema: type[Config], values: Any) -> Any:
    """`values` with the defaults of nested configs beneath them, as far as these are of the same variant.

    Without this, setting one key of `optimizer` would lose the defaults that this job gives its other keys, and
    `method.rank=4` would have to be told that it means the default method.
    """
    if not isinstance(values, dict):
        return values
    filled = dict(values)
    for name, field in schema.model_fields.items():
        default, given = field.default, filled.get(name)
        if not isinstance(default, Config) or not isinstance(given, dict):
            continue
        variant = getattr(default, "type", None)
        if given.get("type", variant) == variant:
            beneath = {key: getattr(default, key) for key in type(default).model_fields}
            filled[name] = {**beneath, **_over_defaults(type(default), given)}
    return filled


def _explain(schema: type[Config], item: Any) -> str:
    """One line per pydantic error: key, value, remedy."""
    # A tagged union puts the tag into the location; the user wrote no such key.
    path = [str(part) for part in item["loc"]]
    key, value, kind = ".".join(part for part in path if part not in _variants(schema)), item["input"], item["type"]
    if kind == "union_tag_invalid":
        return f"{key}.type={item['ctx']['tag']!r}: unknown; one of {item['ctx']['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{key}={value!r}: needs a type"
    if kind == "extra_forbidden":
        known = _known_keys(schema, path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{key}={value!r}: unknown key; {remedy}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key}={value!r}: holds settings of its own: {', '.join(_known_keys(schema, path))}"
    if kind == "missing":
        return f"{key}: required; add it to the config file or pass {key}=VALUE"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        return f"{key}={value!r}: {message}" if key else message
    return f"{key}={value!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _known_keys(schema: type[Config], path: list[str]) -> list[str]:
    """The fields of the model that `path` leads to, through nested models and the tags of unions."""
    models = [schema]
    for part in path:
        if part.isdigit():  # a place in a list
            continue
        tagged = [model for model in models if _variant(model) == part]
        models = tagged or [inner for model in models for inner in _nested(model, part)]
    return sorted({name for model in models for name in model.model_fields})


def _variants(schema: type[Config]) -> set[str]:
    """The tags of all unions below `schema`: pydantic puts them into an error's location, users do not write them."""
    found: set[str] = set()
    for name in schema.model_fields:
        for inner in _nested(schema, name):
            tag = _variant(inner)
            found |= _variants(inner) | ({tag} if tag else set())
    return found


def _variant(model: type[Config]) -> str | None:
    field = model.model_fields.get("type")
    return field.default if field is not None else None


def _nested(model: type[Config], field: str) -> list[type[Config]]:
    """The configs that a field may hold: one, several in a union or a list, or none."""
    return _configs_in(model.model_fields[field].annotation) if field in model.model_fields else []


def _configs_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [config for inner in typing.get_args(annotation) for config in _configs_in(inner)]
