"""Prefix tuning: Optimizing Continuous Prompts for Generation (Li & Liang 2021, arXiv:2101.00190).

In each layer, trained keys and values stand before those of the sequence, and every token sees them. Optionally an MLP
makes them from one small matrix while training (section 4.3), which is more stable at high learning rates.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from app.config.methods import PrefixConfig
from app.errors import UserError
from app.models.attention import KeysValues, Recorder
from app.models.decoder import Decoder, Prefix

NO_MERGE = "no weights of a plain model put keys and values before a sequence; serve the delta"


class TrainedPrefix(Prefix):
    """`keys` and `values` [layers, kv_heads, length, head_width] themselves."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.length = keys.shape[2]
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)

    def forward(self, decoder: Decoder) -> list[KeysValues]:
        # Copies: where weights are partitioned (ZeRO-3), the parameters themselves are whole within this call only.
        return list(zip(self.keys.clone(), self.values.clone(), strict=True))


class ReparameterizedPrefix(Prefix):
    """Keys and values from a two-layer MLP over an embedding of each place."""

    def __init__(self, model: Decoder, config: PrefixConfig, *, mlp_width: int) -> None:
        super().__init__()
        shape, device = model.config, model.token_embedding.weight.device
        self.length = config.length
        self.shape = (config.length, shape.num_layers, 2, shape.kv_heads, shape.head_width)
        self.embeddings = nn.Parameter(torch.randn(config.length, shape.width, device=device))
        self.hidden = nn.Linear(shape.width, mlp_width, device=device)
        self.out = nn.Linear(mlp_width, shape.num_layers * 2 * shape.kv_heads * shape.head_width, device=device)

    def forward(self, decoder: Decoder) -> list[KeysValues]:
        made = self.out(torch.tanh(self.hidden(self.embeddings))).view(self.shape)
        keys, values = made.permute(2, 1, 3, 0, 4)  # each [layers, kv_heads, length, head_width]
        return list(zip(keys, values, strict=True))


def apply(model: Decoder, config: PrefixConfig) -> None:
    """Put a prefix before every sequence, in place.

    Raises:
        UserError: the context has no room for it.
    """
    check_length(model, config.length)
    if config.mlp_width is None:
        model.prefix = TrainedPrefix(*_of_words(model, config.length))
    else:
        model.prefix = ReparameterizedPrefix(model, config, mlp_width=config.mlp_width)


@torch.no_grad()
def without_mlp(model: Decoder, config: PrefixConfig) -> PrefixConfig:
    """Replace a prefix that an MLP makes by what it makes, in place; returns the config of that."""
    if config.mlp_width is not None:
        assert model.prefix is not None
        keys, values = zip(*model.prefix(model), strict=True)
        model.prefix = TrainedPrefix(torch.stack(keys), torch.stack(values))
    return config.model_copy(update={"mlp_width": None})


def check_length(model: Decoder, length: int) -> None:
    """
    Raises:
        UserError: `length` virtual tokens leave no room in the context.
    """
    if length + 2 > model.config.context_length:
        raise UserError(
            f"method.length={length} leaves no room for a text in the model's context of {model.config.context_length}"
        )


def draw_words(model: Decoder, length: int) -> Tensor:
    """Embeddings [length, width] of tokens drawn from the vocabulary: a start that the model can read."""
    weight = model.token_embedding.weight
    ids = torch.randint(weight.shape[0], (length,), device=weight.device)
    return weight.detach()[ids].float()


def record(model: Decoder, embeddings: Tensor) -> list[KeysValues]:
    """The keys and values that `embeddings` [length, width] have in each layer as the first tokens of a sequence."""
    recorder = Recorder(backend=model.attention)
    positions = torch.arange(embeddings.shape[0], device=embeddings.device)
    model.run_blocks(embeddings.unsqueeze(0), positions, recorder)
    return recorder.layers


@torch.no_grad()
def _of_words(model: Decoder, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of words: the paper finds that random ones learn worse (section 7.4)."""
    words = draw_words(model, length).to(model.token_embedding.weight.dtype)
    # a base in bf16 may have other techniques' weights in fp32 on it already
    is_mixed = words.dtype == torch.bfloat16 and words.device.type != "meta"
    with torch.autocast(words.device.type, dtype=words.dtype) if is_mixed else nullcontext():
        keys, values = zip(*record(model, words), strict=True)
    return torch.stack(keys).float(), torch.stack(values).float()
