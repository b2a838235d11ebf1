"""Text <-> token ids, and a record's ids with its loss mask. Knows no files of records and no Ray."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend

from app.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
"""What a model folder may hold of its tokenizer."""

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A byte-level BPE tokenizer with its end-of-text id."""

    def __init__(self, backend: Backend, *, source: str) -> None:
        end_id = backend.token_to_id(END_OF_TEXT)
        if end_id is None:
            raise UserError(f"{source}: the tokenizer has no {END_OF_TEXT} token; only GPT-2's kind is supported")
        self.backend = backend
        self.end_id: int = end_id

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges and rules: equal for tokenizers that encode alike."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model folder: tokenizer.json, or GPT-2's vocab.json and merges.txt.

    Raises:
        UserError: none of these files is there, or they are damaged.
    """
    combined, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if combined.exists():
            backend = Backend.from_file(str(combined))
        elif vocab.exists() and merges.exists():
            backend = _gpt2_backend(vocab, merges)
        else:
            raise UserError(f"{folder} lacks tokenizer.json (or vocab.json and merges.txt)")
    except UserError:
        raise
    except Exception as error:  # the Rust library raises plain Exception for every damaged file
        raise UserError(f"{folder}: the tokenizer files are damaged: {error}") from None
    return Tokenizer(backend, source=str(folder))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json beside a model, in the form that `transformers` opens too."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        f'{{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "{END_OF_TEXT}"}}\n'
    )


@dataclass(frozen=True)
class Tokens:
    """One record: `loss_mask[i]` says whether predicting `input_ids[i]` counts in the loss."""

    input_ids: list[int]
    loss_mask: list[bool]
    truncated: bool = False


def join(prompt: Sequence[int], response: Sequence[int], *, end_id: int, max_length: int) -> Tokens | None:
    """Prompt + response + end of text, with only response and end in the loss.

    The ends were encoded apart: encoding the joined text would let BPE merge across the seam, and searching the
    response's start in the ids is then wrong. A response that is too long loses its tail and its end token, so that
    no false ending is learned. None where the prompt leaves no room for a single response token.
    """
    whole = [*prompt, *response, end_id]
    ids = whole[:max_length]
    if len(ids) <= len(prompt):
        return None
    mask = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    return Tokens(ids, mask, truncated=len(ids) < len(whole))


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer (GPT-2's pre-tokenization) learned from `texts`, end of text as its last id."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # one id is kept for the end of text
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, source="the trained tokenizer")


def _gpt2_backend(vocab: Path, merges: Path) -> Backend:
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])  # gives it its id from vocab.json, and keeps it whole
    return backend
