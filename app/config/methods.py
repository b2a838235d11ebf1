"""The fine-tuning techniques' settings: one class each, a tagged union over all, and which go together.

Does not know models: what a name such as `attn.qkv` matches is checked where the technique meets one.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from app.config.base import Config, Fraction, Positive


class LoraConfig(Config):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    """Linear layers of each block that get an update, by the end of their name."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead, so that large ranks learn as fast (rsLoRA, Kalajdzievski 2023)."""
    dora: bool = False
    """Train each row's length apart from its direction, which alone gets the update (DoRA, Liu et al. 2024)."""


class AdapterConfig(Config):
    """Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751)."""

    type: Literal["adapter"] = "adapter"
    size: Positive = 64
    """Width of the bottleneck."""
    placement: Literal["attention_and_mlp", "mlp"] = "attention_and_mlp"
    """After which layers of each block adapters stand."""


class PrefixConfig(Config):
    """Prefix tuning (Li & Liang 2021, arXiv:2101.00190)."""

    type: Literal["prefix"] = "prefix"
    length: Positive = 20
    """Keys and values before each sequence, per layer; the context holds as many tokens less."""
    mlp_width: Positive | None = None
    """Hidden width of an MLP that makes keys and values while training and is dropped after it; none trains them
    directly, from those of words of the vocabulary."""


class PromptConfig(Config):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691)."""

    type: Literal["prompt"] = "prompt"
    length: Positive = 20
    """Trained embeddings before each sequence; the context holds as many tokens less."""


class FreezeConfig(Config):
    """Selective freezing: the model's own weights train, but for some."""

    type: Literal["freeze"] = "freeze"
    frozen: Annotated[tuple[str, ...], Field(min_length=1)]
    """What stays as it is: `embeddings`, `head` (one with the token embedding), `blocks.0-7`, or any module by its
    name, such as `blocks.3.attn`."""


class ExtraBlockConfig(Config):
    """Extra transformer blocks (Wu et al. 2024, LLaMA Pro, arXiv:2401.02415)."""

    type: Literal["extra_block"] = "extra_block"
    count: Positive = 1
    """Spread evenly over the depth; one stands at the end."""


class BitFitConfig(Config):
    """Biases only (Ben Zaken et al. 2021, arXiv:2106.10199)."""

    type: Literal["bitfit"] = "bitfit"


class FullConfig(Config):
    """Every weight trains."""

    type: Literal["full"] = "full"


_Technique = (
    LoraConfig
    | AdapterConfig
    | PrefixConfig
    | PromptConfig
    | FreezeConfig
    | ExtraBlockConfig
    | BitFitConfig
    | FullConfig
)
SingleMethod = Annotated[_Technique, Field(discriminator="type")]


class ComposedConfig(Config):
    """Several techniques at once; written as a list of them."""

    type: Literal["composed"] = "composed"
    parts: tuple[SingleMethod, ...]
    """`method=[{type: extra_block}, {type: lora, rank: 4}]`"""

    @model_validator(mode="after")
    def _check(self) -> "ComposedConfig":
        kinds = [part.type for part in self.parts]
        if not kinds:
            raise ValueError("the list is empty; name at least one technique")
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice:
            raise ValueError(f"{twice} stands there twice; one with larger settings does the same")
        if "full" in kinds:
            raise ValueError("full trains every weight already, so nothing goes with it")
        if {"prefix", "prompt"} <= set(kinds):
            raise ValueError("prefix and prompt both claim the place before a sequence; choose one")
        if {"freeze", "bitfit"} <= set(kinds):
            raise ValueError("freeze and bitfit both choose among the model's own weights; choose one")
        return self


def _as_composed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 1 else {"type": "composed", "parts": value}
    return value


MethodConfig = Annotated[_Technique | ComposedConfig, Field(discriminator="type"), BeforeValidator(_as_composed)]


def name_of(method: MethodConfig) -> str:
    """`lora`, or `extra_block + lora`."""
    return " + ".join(part.type for part in parts_of(method))


def prefix_length(method: MethodConfig | None) -> int:
    """Virtual tokens that `method` puts before each sequence: the context holds as many others less."""
    parts = parts_of(method) if method is not None else ()
    return sum(part.length for part in parts if isinstance(part, PrefixConfig | PromptConfig))


def parts_of(method: MethodConfig) -> tuple[SingleMethod, ...]:
    """The single techniques that `method` consists of."""
    return method.parts if isinstance(method, ComposedConfig) else (method,)
