"""Settings of the commands on models and deltas that need no cluster: describe, deltas, merge, export, import."""

from typing import Literal

from app.config.base import Config, LocalPath, ModelName
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
