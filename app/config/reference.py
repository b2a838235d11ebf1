"""docs/configuration.md, from the schema: `python -m app.config.reference > docs/configuration.md`."""

import typing

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


def _rows(config: type[Config], *, prefix: str, defaults: Config | None = None) -> list[str]:
    rows: list[str] = []
    for name, field in config.model_fields.items():
        default = getattr(defaults, name) if defaults is not None else field.default
        variants = _configs(field)
        if not variants:
            rows.append(f"| `{prefix}{name}` | {_shown(default, field)} | {_meaning(field)} |")
        for variant in variants:
            is_default = isinstance(default, variant)
            rows += _rows(variant, prefix=f"{prefix}{name}.", defaults=default if is_default else None)
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
    return " ".join((field.description or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(render(), end="")
