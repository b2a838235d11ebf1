"""Text <-> token ids. Knows no records and no Ray."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from app.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
"""What a model folder may hold of its tokenizer."""

END_OF_TEXT = "<|endoftext|>"

# GPT-2's pre-tokenization (Radford et al. 2019, encoder.py), as tiktoken writes it.
_GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_LONGEST_FAST_TEXT = 100_000
"""Characters; tiktoken's time grows faster than a text's length where a single word is very long."""

CANONICAL = {
    "f93d84a01b0e22e54c109fc65cea3d0541758c9adabbb34770bc27939b548b9b": "GPT-2's",
    "1f7f619e3d88126ab5f1566ec4f74121a3f19f2bdaf740ecfead1e78a6fdbc5c": "the embedded base's",
}
"""Fingerprints of tokenizers that `is_canonical` needs not look through again; a test does."""


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

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts that become one id wherever they stand, so that content must not hold them."""
        return tuple(token.content for token in self.backend.get_added_tokens_decoder().values())

    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges and rules: equal for tokenizers that encode alike."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *, is_canonical: bool = False) -> list[list[int]]:
        """`encode` of each text; by tiktoken, several times faster, for a tokenizer that is known to be canonical."""
        if not is_canonical:
            return self._encode_batch(texts)
        fast = self._tiktoken.encode_ordinary
        return [
            self.encode(text) if len(text) > _LONGEST_FAST_TEXT or self._holds_special(text) else fast(text)
            for text in texts
        ]

    def _holds_special(self, text: str) -> bool:
        for token in self.special_tokens:  # noqa: SIM110  any() takes three times as long
            if token in text:
                return True
        return False

    def is_canonical(self) -> bool:
        """Whether tiktoken gives the same ids: the words are GPT-2's, and BPE makes of each entry's text that entry.

        tiktoken merges any two neighbours that make an entry of the vocabulary, the lowest id first; `tokenizers`
        merges the pairs of its list, in the list's order. With ids in that order the two can only part where
        neighbours make an entry that is not made of them by the list. But then BPE of that entry's own text, which
        goes through the same merges, comes to the same neighbours and stops there.
        """
        if not self._splits_as_gpt2():
            return False
        if self.fingerprint() in CANONICAL:
            return True
        state = json.loads(self.backend.to_str())["model"]
        merges = (merge if isinstance(merge, str) else "".join(merge) for merge in state["merges"])
        made = [state["vocab"].get(merge.replace(" ", "")) for merge in merges]
        if None in made or made != sorted(made):
            return False
        model, special = self.backend.model, set(self.special_tokens)
        return all(
            [token.id for token in model.tokenize(text)] == [entry]
            for text, entry in state["vocab"].items()
            if text not in special
        )

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _splits_as_gpt2(self) -> bool:
        model, splitter = self.backend.model, self.backend.pre_tokenizer
        plain: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        rules = json.loads(splitter.__getstate__()) if splitter else {}
        return (
            self.backend.normalizer is None
            and {key: rules.get(key) for key in plain} == plain
            and isinstance(model, BPE)
            and not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)
        )

    @cached_property
    def _tiktoken(self) -> Any:
        ranks = {content: entry for entry, content in self._contents.items()}
        return tiktoken.Encoding("", pat_str=_GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})

    @cached_property
    def _contents(self) -> dict[int, bytes]:
        """The bytes of each id, special tokens left out."""
        as_bytes = {ord(character): byte for byte, character in enumerate(_byte_characters())}
        vocabulary = self.backend.get_vocab(with_added_tokens=False)
        for token in self.special_tokens:
            vocabulary.pop(token, None)
        return {entry: text.translate(as_bytes).encode("latin-1") for text, entry in vocabulary.items()}

    def token_bytes(self) -> list[bytes]:
        """What each id stands for in a text: nothing for special tokens. Characters may be parted between ids."""
        return [self._contents.get(entry, b"") for entry in range(self.vocab_size)]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=not keep_special)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files of model folder `source` into `target`."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target)


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


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself where it can be seen, else one from U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]
