"""Settings of the commands on models and deltas that need no cluster."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.config.base import Config, LocalPath, ModelName, Positive
from app.config.methods import MethodConfig


class DescribeConfig(Config):
    """`pacos describe`: what trains, and what memory that takes."""

    model: ModelName
    """`embedded`, a folder, or a Hugging Face name; GPT-2's sizes need no download."""
    method: MethodConfig | None = None
    """None describes the model alone."""


class DeltasConfig(Config):
    """`pacos deltas`: the deltas below a folder."""

    folder: LocalPath


class MergeConfig(Config):
    """`pacos merge`: a delta and its base to a plain model folder."""

    delta: LocalPath
    output: LocalPath
    """Folder to write; replaced as a whole."""
    model: ModelName | None = None
    """The base; none takes the one that the delta names."""


class ExportConfig(Config):
    """`pacos export`: a delta to another library's format."""

    delta: LocalPath
    output: LocalPath
    """Folder to write; replaced as a whole."""
    format: Literal["peft"] = "peft"
    model: ModelName | None = None
    """The base; none takes the one that the delta names."""


class ImportConfig(Config):
    """`pacos import`: another library's adapter to a delta."""

    source: LocalPath
    """Folder with adapter_config.json and adapter_model.safetensors."""
    output: LocalPath
    """Folder to write; replaced as a whole."""
    model: ModelName
    """The base that the adapter was trained on."""
    format: Literal["peft"] = "peft"


class QuantizeConfig(Config):
    """`pacos quantize`: a smaller model folder, and what it costs, measured."""

    model: ModelName = "embedded"
    scheme: Literal["int8_dynamic", "int8_static", "int8_weight", "nf4"]
    """int8_dynamic: weights and activations of 8 bits, activations scaled as they come; int8_static: scaled as seen on
    `data`; int8_weight: activations stay floats; nf4: so do they, over weights of 4 bits."""
    output: LocalPath
    """Folder to write; replaced as a whole."""
    data: LocalPath | None = None
    """Folder that `pacos prepare` wrote: its held-out records give the perplexity, its training records the ranges of
    int8_static."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    """Linear layers of each block to quantize, by the end of their name."""
    calibration_records: Positive = 128
    """Training records that int8_static sees."""
    max_records: Positive | None = None
    """Held-out records to score; none scores all."""
    threads: Positive = 2

    @model_validator(mode="after")
    def _check(self) -> "QuantizeConfig":
        if self.scheme == "int8_static" and self.data is None:
            raise ValueError("scheme='int8_static' needs data to calibrate on; pass data=…, or take int8_dynamic")
        if self.scheme != "int8_static" and "calibration_records" in self.model_fields_set:
            raise ValueError(f"calibration_records is for int8_static; scheme={self.scheme!r} sees no data")
        if self.max_records is not None and self.data is None:
            raise ValueError("max_records limits the records of data, and there are none; pass data=…")
        return self
