import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from app.assets import EMBEDDED_BASE
from app.data import tokenization
from app.data.tokenization import END_OF_TEXT, Tokenizer, load_tokenizer, save_tokenizer
from app.errors import UserError

# what GPT-2's splitting turns on, often
TRICKY = st.text(st.sampled_from(" \t\n\r\f\v\x1c\x85\u00a0'sStdlvrem0159azAZ_-.,!?é日🙂<|>")) | st.text()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


@given(st.lists(TRICKY, max_size=8))
@settings(max_examples=500)
def test_encoding_many_texts_gives_the_ids_of_each_alone(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.is_canonical()
    texts = [*texts, "It's " + END_OF_TEXT, *(text.encode("ascii", "ignore").decode() for text in texts)]
    alone = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts, is_canonical=True) == tokenizer.encode_batch(texts) == alone


def test_both_ways_split_at_every_character_alike(tokenizer: Tokenizer) -> None:
    """The two libraries bring their own tables of what is a letter, a number and white space."""
    # beyond plane 3 next to nothing is assigned
    codes = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, sys.maxunicode + 1, 97)]
    characters = [chr(code) for code in codes]
    texts = [f"a{character}1 {character}'s  {character}" for character in characters]
    fast = tokenizer.encode_batch(texts, is_canonical=True)
    slow = tokenizer.encode_batch(texts)
    different = [hex(ord(c)) for c, one, other in zip(characters, fast, slow, strict=True) if one != other]
    assert not different


def test_encoding_many_real_texts_gives_gpt2s_ids(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer")
    texts = (shared_data / "tinyshakespeare/input.txt").read_text().split("\n\n")
    texts += (shared_data / "dolly/dolly_15k.jsonl").read_text().split("\n")[:3000]
    assert tokenizer.encode_batch(texts, is_canonical=True) == tokenizer.encode_batch(texts)


def test_a_very_long_word_takes_no_longer_than_it_should(tokenizer: Tokenizer) -> None:
    texts = ["a" * 300_000, "^" * 99_000, " " * 300_000]
    assert tokenizer.encode_batch(texts, is_canonical=True) == tokenizer.encode_batch(texts)


def test_the_tokenizers_that_are_taken_for_canonical_are(shared_data: Path, monkeypatch) -> None:
    known = [load_tokenizer(folder) for folder in (shared_data / "gpt2_tokenizer", EMBEDDED_BASE)]
    assert [tokenizer.fingerprint() for tokenizer in known] == list(tokenization.CANONICAL)
    monkeypatch.setattr(tokenization, "CANONICAL", {})
    assert all(tokenizer.is_canonical() for tokenizer in known)


def test_a_tokenizer_that_tiktoken_would_read_otherwise_is_not_canonical(tokenizer: Tokenizer) -> None:
    rules = json.loads(tokenizer.backend.to_str())
    swapped = json.loads(json.dumps(rules))
    merges = swapped["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]  # an order that is not that of the ids
    dead = json.loads(json.dumps(rules))
    dead["model"]["vocab"]["xqz"] = len(dead["model"]["vocab"])  # an entry that no merge makes
    digits = json.loads(json.dumps(rules))
    digits["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, rules["pre_tokenizer"]],
    }
    lower = {**rules, "normalizer": {"type": "Lowercase"}}
    for changed in (swapped, dead, digits, lower):
        backend = Backend.from_str(json.dumps(changed))
        assert not Tokenizer(backend, source="changed").is_canonical()


def test_any_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    text = "naïve “quotes”, tabs\tand 日本語 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_bytes_of_ids_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    contents = tokenizer.token_bytes()
    text = "Ärger über 3 Äpfel – 🦙\n\tdone"
    assert b"".join(contents[entry] for entry in tokenizer.encode(text)) == text.encode()
    assert len(contents) == tokenizer.vocab_size and contents[tokenizer.end_id] == b""


def test_the_saved_tokenizer_opens_in_transformers(tiny_model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Instruction: Say hello.\nInput: to all\nResponse: Hello, all."
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.end_id


def test_gpt2_vocab_and_merges_give_gpt2s_ids(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer")
    assert tokenizer.encode("Instruction:") == [6310, 2762, 25]
    assert (tokenizer.vocab_size, tokenizer.end_id) == (50257, 50256)
    assert tokenizer.encode(END_OF_TEXT) == [50256]
    assert tokenizer.special_tokens == (END_OF_TEXT,)


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)
