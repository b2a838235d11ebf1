"""What all contenders generate: greedy, end tokens ignored, so that every answer has the length that was asked for."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

VOCAB_SIZE = 50257


@dataclass(frozen=True)
class Request:
    ids: list[int]
    new_tokens: int


def workload(name: str, *, scale: float = 1.0) -> list[Request]:
    """W1: one request of 64 prompt and 128 new tokens. W2: 64 at once, W3: 500, of 16 to 128 each, seed 0. `scale`
    multiplies how many there are."""
    draw = random.Random(0)
    if name == "W1":
        return [Request([draw.randrange(VOCAB_SIZE) for _ in range(64)], 128)]
    count = round({"W2": 64, "W3": 500}[name] * scale)
    return [
        Request([draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(16, 128))], draw.randint(16, 128))
        for _ in range(count)
    ]


def make_model(folder: Path) -> None:
    """GPT-2 124M with random weights, and a tokenizer that gives every id a word, which peers want to see."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word(number): number for number in range(VOCAB_SIZE)}, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = word(VOCAB_SIZE - 1)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=end, eos_token=end, bos_token=end).save_pretrained(
        folder
    )


def word(number: int) -> str:
    return f"t{number}"


def write_requests(requests: list[Request], file: Path) -> None:
    file.write_text(json.dumps([vars(request) for request in requests]))


def read_requests(file: Path) -> list[Request]:
    return [Request(**fields) for fields in json.loads(file.read_text())]
