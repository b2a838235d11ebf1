"""docs/configuration.md, from the schema: `python -m app.config.reference > docs/configuration.md`."""

import typing
from typing import Any

from pydantic.fields import FieldInfo

from app.config import data, schema, serving, sweep, tracking, transfer
from app.config.base import Config

COMMANDS: dict[str, type[Config]] = {
    "pacos prepare": data.PrepareConfig,
    "pacos inspect": data.InspectConfig,
    "pacos pretrain": schema.PretrainConfig,
    "pacos train": schema.TrainConfig,
    "pacos sweep": sweep.SweepConfig,
    "pacos evaluate": schema.EvaluateConfig,
    "pacos generate": schema.GenerateConfig,
    "pacos describe": transfer.DescribeConfig,
    "pacos deltas": transfer.DeltasConfig,
    "pacos merge": transfer.MergeConfig,
    "pacos export": transfer.ExportConfig,
    "pacos import": transfer.ImportConfig,
    "pacos quantize": transfer.QuantizeConfig,
    "pacos models": tracking.ModelsConfig,
    "pacos promote": tracking.PromoteConfig,
    "pacos promote --best": sweep.PromoteBestConfig,
    "pacos index": schema.IndexConfig,
    "pacos serve": serving.ServeConfig,
    "pacos ask": serving.AskConfig,
    "pacos key": serving.KeyConfig,
    "pacos quickstart": schema.QuickstartConfig,
}

HEAD = """# Configuration

Made from `app/config/` by `python -m app.config.reference`.

Each command takes a YAML file (`--config FILE`) and, above it, `key=value` overrides with dots into sections:
`pacos train --config configs/alpaca-lora.yaml method.rank=16 optimizer.learning_rate=1e-3`. Values are read as YAML:
`null`, `[a, b]`, `{a: 1}`. Unknown keys are errors. Relative paths are taken from the current directory.
"""


def render() -> str:
    sections = [HEAD]
    for command, config in COMMANDS.items():
        rows = "\n".join(_rows(config, prefix=""))
        sections.append(f"## {command}\n\n| key | default | meaning |\n|---|---|---|\n{rows}\n")
    return "\n".join(sections)


def _rows(config: type[Config], *, prefix: str, defaults: Config | None = None, is_optional: bool = False) -> list[str]:
    """`is_optional`: of a section that may be left out, or a list that may be empty."""
    rows: list[str] = []
    for name, field in config.model_fields.items():
        default = getattr(defaults, name) if defaults is not None else field.default
        variants = _configs(field)
        may_be_left_out = default is None or default == ()
        if not variants or may_be_left_out:
            shown = _shown(default, field)
            shown += ", if the section is given" if is_optional and shown == "required" else ""
            rows.append(f"| `{prefix}{name}` | {shown} | {_meaning(field)} |")
        for variant in variants:
            is_default = isinstance(default, variant)
            defaults_there = default if is_default else None
            rows += _rows(variant, prefix=f"{prefix}{name}.", defaults=defaults_there, is_optional=may_be_left_out)
    return rows


def _configs(field: FieldInfo) -> list[type[Config]]:
    kinds = (field.annotation, *typing.get_args(field.annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)]


def _shown(default: object, field: FieldInfo) -> str:
    if field.is_required() and default is field.default:
        return "required"
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return "`null`" if default is None else f"`{default}`" if default != "" else "`''`"


def _meaning(field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    choices = _choices(field.annotation)
    if len(choices) > 1 and not all(f"`{choice}`" in meaning for choice in choices):
        meaning += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    return meaning.strip().replace("|", "\\|")


def _choices(annotation: Any) -> tuple[str, ...]:
    """The words that a setting may be; none where it may be anything else too."""
    if typing.get_origin(annotation) is typing.Literal:
        return tuple(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Annotated:
        return _choices(typing.get_args(annotation)[0])
    return ()


if __name__ == "__main__":
    print(render(), end="")
