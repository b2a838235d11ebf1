"""Settings of the jobs on data: `pacos prepare` and `pacos inspect`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from app.config.base import Config, Fraction, LocalPath, ModelName, Positive, Seed, SourceName


def _as_tuple(value: Any) -> Any:
    """One stands for a list of one."""
    return value if isinstance(value, list | tuple) else (str(value),)


class PacosTemplateConfig(Config):
    """`Instruction: …`, `Input: …`, `Response: …`, a line each."""

    type: Literal["pacos"] = "pacos"


class AlpacaTemplateConfig(Config):
    """Stanford Alpaca's two prompts, with and without an input."""

    type: Literal["alpaca"] = "alpaca"


class ChatTemplateConfig(Config):
    """A Jinja chat template, as `transformers` understands it."""

    type: Literal["chat"] = "chat"
    file: LocalPath | None = None
    """File with the template; none takes the `chat_template` of the model's tokenizer."""


class RawTemplateConfig(Config):
    """Prompts and responses as they are written in the records."""

    type: Literal["raw"] = "raw"


TemplateConfig = Annotated[
    PacosTemplateConfig | AlpacaTemplateConfig | ChatTemplateConfig | RawTemplateConfig, Field(discriminator="type")
]


class PaddedLayout(Config):
    """One record a row; a batch is padded to its longest row."""

    type: Literal["padded"] = "padded"


class FixedLayout(Config):
    """One record a row; every row is padded to `length`: one shape for compilers and static graphs."""

    type: Literal["fixed"] = "fixed"
    length: Annotated[int, Field(ge=8)] = 512


class PackedLayout(Config):
    """Several records a row, with positions and attention of their own: hardly any padding."""

    type: Literal["packed"] = "packed"
    length: Annotated[int, Field(ge=8)] = 1024
    """Tokens a row."""


Layout = Annotated[PaddedLayout | FixedLayout | PackedLayout, Field(discriminator="type")]
RecordFormat = Literal["alpaca", "dolly", "prompt_completion", "chat", "text"]


_FIELDS: dict[RecordFormat, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text": ("text",),
}


class PrepareConfig(Config):
    """`pacos prepare`: instruction records to tokenized Parquet shards."""

    source: Annotated[tuple[SourceName, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    """Files, globs, `s3://` or `gs://` URIs, or names of Hugging Face datasets; one or a list. JSON, JSONL, Parquet or
    CSV, gzipped or not."""
    output: LocalPath
    """Folder to write; replaced as a whole once the new shards are complete."""
    model: ModelName = "embedded"
    """Model whose tokenizer is used: `embedded`, a folder, or a Hugging Face name."""
    format: Literal["auto", "alpaca", "dolly", "prompt_completion", "chat", "text"] = "auto"
    """How records name their parts; `auto` tells by the fields of each file's first records."""
    fields: dict[str, str] = {}
    """Other names of a format's fields, as in `fields={instruction: question, output: answer}`."""
    template: TemplateConfig = PacosTemplateConfig()
    """How a record becomes text. It travels with the shards and with every delta that is trained on them."""
    on_invalid: Literal["repair", "drop", "fail"] = "repair"
    """`repair` mends what has one obvious remedy and drops the rest, `drop` drops both, `fail` stops at the first."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of records that may be dropped, duplicates aside, before the job stops."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What becomes of a record that says the same as an earlier one."""
    layout: Layout = PaddedLayout()
    """How training records lie in rows. Held-out records are one a row in any layout."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Longest record in tokens."""
    truncation: Literal["prompt", "response", "drop"] = "prompt"
    """What a longer record loses: the middle of its prompt, the tail of its response, or its place."""
    validation_fraction: Fraction = 0.05
    """Share of records held out, chosen by a hash of each record's content."""
    test_fraction: Fraction = 0.0
    """Share held out besides, for a last look; a record's place does not depend on `validation_fraction`."""
    records_per_shard: Positive = 4000
    """Source records that one task reads, and one shard comes from."""
    seed: Seed = 0
    """Of the order of training rows within a shard."""

    @model_validator(mode="after")
    def _check(self) -> "PrepareConfig":
        formats = _FIELDS if self.format == "auto" else {self.format: _FIELDS[self.format]}
        known = sorted({name for names in formats.values() for name in names})
        for name in self.fields:
            if name not in known:
                raise ValueError(f"fields.{name}: format={self.format} has no such field; it has {', '.join(known)}")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} leave nothing "
                "to train on; they must add up to less than 1"
            )
        length = getattr(self.layout, "length", self.max_length)
        if length < self.max_length:
            raise ValueError(f"layout.length={length} must be at least max_length={self.max_length}")
        return self


class InspectConfig(Config):
    """`pacos inspect`: what prepared data looks like, in the terminal and as a page."""

    data: LocalPath
    """Folder that `pacos prepare` wrote."""
    split: Literal["train", "validation", "test"] = "train"
    samples: Annotated[int, Field(ge=0)] = 3
    """Records to show, drawn by `seed`."""
    seed: Seed = 0
    report: LocalPath | None = None
    """HTML file to write; none writes `report.html` into the folder."""
