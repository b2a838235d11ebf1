"""Configuration: `schema` says what may be set, `load` turns YAML and overrides into it."""

from app.config.base import Config
from app.config.data import InspectConfig, PrepareConfig
from app.config.load import load_config, validate
from app.config.schema import (
    ApplicationConfig,
    AskConfig,
    CacheConfig,
    DeepSpeedConfig,
    EvaluateConfig,
    FullConfig,
    GeneratorConfig,
    IndexConfig,
    LoraConfig,
    MemoryCacheConfig,
    MethodConfig,
    OptimizerConfig,
    PretrainConfig,
    QuickstartConfig,
    RedisCacheConfig,
    RetrieverConfig,
    ServeConfig,
    TrainConfig,
    WorkersConfig,
)

__all__ = [
    "ApplicationConfig",
    "AskConfig",
    "CacheConfig",
    "Config",
    "DeepSpeedConfig",
    "EvaluateConfig",
    "FullConfig",
    "GeneratorConfig",
    "IndexConfig",
    "InspectConfig",
    "LoraConfig",
    "MemoryCacheConfig",
    "MethodConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "PretrainConfig",
    "QuickstartConfig",
    "RedisCacheConfig",
    "RetrieverConfig",
    "ServeConfig",
    "TrainConfig",
    "WorkersConfig",
    "load_config",
    "validate",
]
