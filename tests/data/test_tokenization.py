from pathlib import Path

import numpy as np
import pytest

from app.data.batches import collate
from app.data.prompts import render_prompt, render_response
from app.data.records import Record
from app.data.shards import tokenize_record
from app.data.tokenization import END_OF_TEXT, join, load_tokenizer
from app.errors import UserError


@pytest.fixture
def tokenizer(tiny_model: Path):
    return load_tokenizer(tiny_model)


def test_loss_is_over_the_response_and_the_end_only(tokenizer) -> None:
    record = Record("Add the numbers.", "2 and 3", "The sum is 5.")
    tokens = tokenize_record(record, tokenizer, max_length=200)
    in_loss = [i for i, counts in zip(tokens.input_ids, tokens.loss_mask, strict=True) if counts]
    outside = [i for i, counts in zip(tokens.input_ids, tokens.loss_mask, strict=True) if not counts]
    assert tokenizer.decode(outside) == "Instruction: Add the numbers.\nInput: 2 and 3\nResponse:"
    assert tokenizer.decode(in_loss[:-1]) == " The sum is 5."
    assert in_loss[-1] == tokenizer.end_id


def test_prompt_ids_are_those_that_serving_sends(tokenizer) -> None:
    # Encoded apart: the ids of the prompt do not depend on how the response begins.
    record = Record("Say it.", "", "x")
    tokens = tokenize_record(record, tokenizer, max_length=200)
    prompt = tokenizer.encode(render_prompt("Say it."))
    assert tokens.input_ids[: len(prompt)] == prompt


def test_a_cut_response_keeps_its_head_and_loses_its_end(tokenizer) -> None:
    tokens = join([1, 2, 3], [4, 5, 6], end_id=9, max_length=5)
    assert tokens.input_ids == [1, 2, 3, 4, 5]
    assert tokens.loss_mask == [False, False, False, True, True]
    assert tokens.truncated


def test_a_prompt_that_leaves_no_room_gives_nothing() -> None:
    assert join([1, 2, 3], [4], end_id=9, max_length=3) is None


def test_padding_is_never_in_the_loss_but_the_end_of_text_is(tokenizer) -> None:
    end = tokenizer.end_id
    batch = collate([np.array([1, 2, end]), np.array([3])], [np.array([False, True, True]), np.array([True])])
    assert batch.input_ids.tolist() == [[1, 2, end], [3, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True], [True, False, False]]
    assert batch.num_tokens == 4


def test_any_text_survives_the_round_trip(tokenizer) -> None:
    text = "naïve “quotes”, tabs\tand 日本語 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_saved_tokenizer_opens_in_transformers(tiny_model: Path, tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_model)
    text = render_prompt("Say hello.", "to all") + render_response("Hello, all.")
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.end_id


def test_gpt2_vocab_and_merges_give_gpt2s_ids(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer")
    assert tokenizer.encode("Instruction:") == [6310, 2762, 25]
    assert (tokenizer.vocab_size, tokenizer.end_id) == (50257, 50256)
    assert tokenizer.encode(END_OF_TEXT) == [50256]


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)
