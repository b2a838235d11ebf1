import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.data.encoding import Tokens, Unusable, encode_records
from app.data.prompts import ChatTemplate, PacosTemplate
from app.data.records import Conversation, Instruction, Invalid, Message, RowReader, Text
from app.data.tokenization import Tokenizer, load_tokenizer

TEXT = st.text(st.characters(exclude_categories=("Cs",))).filter(lambda text: "<|endoftext|>" not in text)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


def encode(record, tokenizer: Tokenizer, *, max_length: int = 512, truncation: str = "prompt", template=None):
    (documents,) = encode_records(
        [record],
        template=template or PacosTemplate(),
        tokenizer=tokenizer,
        max_length=max_length,
        truncation=truncation,
    )
    return documents


def encode_slowly(instruction: str, input: str, output: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels from the definition: the prompt is read, the response and an end of text are learned."""
    prompt = tokenizer.backend.encode("Instruction: " + instruction + "\nInput: " + input + "\nResponse:").ids
    response = tokenizer.backend.encode(" " + output).ids
    end = tokenizer.backend.token_to_id("<|endoftext|>")
    ids, labels = [], []
    for token in prompt:
        ids.append(token)
        labels.append(-100)
    for token in response:
        ids.append(token)
        labels.append(token)
    ids.append(end)
    labels.append(end)
    return ids, labels


def labels_of(tokens: Tokens) -> list[int]:
    return [token if counts else -100 for token, counts in zip(tokens.input_ids, tokens.loss_mask, strict=True)]


def test_masks_of_a_thousand_alpaca_records_are_those_of_the_definition(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer")
    rows = json.loads((shared_data / "alpaca/alpaca_data.json").read_text())
    reader = RowReader("alpaca")
    for row in random.Random(0).sample(rows, 1000):
        try:
            record, _ = reader.read(row)
        except Invalid:
            assert not row["output"].strip()
            continue
        (tokens,) = encode(record, tokenizer, max_length=100_000)
        expected = encode_slowly(record.instruction, record.input, record.output, tokenizer)
        assert (tokens.input_ids, labels_of(tokens)) == expected


@given(instruction=TEXT, input=TEXT, output=TEXT)
def test_any_unicode_is_masked_by_the_definition(tokenizer, instruction: str, input: str, output: str) -> None:
    (tokens,) = encode(Instruction(instruction, input, output), tokenizer, max_length=1_000_000)
    instruction, output = instruction.strip(), output.strip()  # what the template does
    assert (tokens.input_ids, labels_of(tokens)) == encode_slowly(instruction, input, output, tokenizer)


def test_the_batch_of_an_earlier_project(shared_data: Path) -> None:
    """16 records padded to the longest, padding labelled -100, and the ids that it printed first."""
    from app.data.batches import collate

    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer")
    rows = json.loads((shared_data / "alpaca/alpaca_data.json").read_text())
    reader = RowReader("alpaca")
    first = next(place for place, row in enumerate(rows) if row["instruction"].startswith("List "))
    documents = [encode(reader.read(row)[0], tokenizer)[0] for row in rows[first : first + 16]]
    batch = collate([d.input_ids for d in documents], [d.loss_mask for d in documents])
    longest = max(len(document.input_ids) for document in documents)
    assert batch.input_ids.shape == batch.labels.shape == (16, longest)
    assert batch.input_ids[0, :4].tolist() == [6310, 2762, 25, 7343]
    for row, document in enumerate(documents):
        length = len(document.input_ids)
        assert batch.labels[row, :length].tolist() == labels_of(document)
        assert batch.labels[row, length - 1] == tokenizer.end_id
        assert (batch.labels[row, length:] == -100).all()
    assert any(len(document.input_ids) < longest for document in documents)


def test_prompt_ids_are_those_that_serving_sends(tokenizer) -> None:
    # Encoded apart: the ids of the prompt do not depend on how the response begins.
    (tokens,) = encode(Instruction("Say it.", "", "x"), tokenizer)
    prompt = tokenizer.encode(PacosTemplate().prompt("Say it."))
    assert tokens.input_ids[: len(prompt)] == prompt


def test_a_response_of_one_token_and_one_of_ten_thousand(tokenizer) -> None:
    (short,) = encode(Instruction("a", "", "b"), tokenizer)
    assert sum(short.loss_mask) == len(tokenizer.encode(" b")) + 1
    output = " ".join(["word"] * 10_000)
    (long,) = encode(Instruction("a", "", output), tokenizer, max_length=200_000)
    assert sum(long.loss_mask) == len(tokenizer.encode(" " + output)) + 1 > 10_000
    (cut,) = encode(Instruction("a", "", output), tokenizer)
    assert len(cut.input_ids) == 512 and cut.is_cut and cut.input_ids[-1] != tokenizer.end_id


@given(
    instruction=st.integers(1, 200), output=st.integers(1, 200), max_length=st.integers(40, 160),
    truncation=st.sampled_from(["prompt", "response", "drop"]),
)  # fmt: skip
def test_what_is_too_long_is_cut_as_the_policy_says(tokenizer, instruction, output, max_length, truncation) -> None:
    record = Instruction("i " * instruction, "", "o " * output)
    (whole,) = encode(record, tokenizer, max_length=100_000)
    prompt, response = whole.loss_mask.count(False), sum(whole.loss_mask)
    documents = encode(record, tokenizer, max_length=max_length, truncation=truncation)
    if len(whole.input_ids) <= max_length:
        assert documents == [whole]
        return
    if truncation == "drop" or (truncation == "response" and prompt >= max_length):
        assert isinstance(documents, Unusable) and f"max_length={max_length}" in documents.reason
        return
    (cut,) = documents
    assert cut.is_cut and len(cut.input_ids) == max_length and sum(cut.loss_mask) > 0
    if truncation == "response":
        assert cut.input_ids == whole.input_ids[:max_length]
    elif response <= max_length * 3 // 4:  # the response is whole, its end of text too
        assert cut.input_ids[-response:] == whole.input_ids[-response:]
        assert sum(cut.loss_mask) == response
    kept = cut.loss_mask.count(False)
    assert cut.input_ids[: kept // 2] == whole.input_ids[: kept // 2]  # the instruction's beginning
    marker = tokenizer.encode("\nResponse:")
    if truncation == "prompt" and kept // 2 >= len(marker):  # and its end, which asks for the response
        assert cut.input_ids[kept - len(marker) : kept] == marker


def test_a_conversation_that_is_too_long_loses_its_last_turns(tokenizer) -> None:
    turns = [Message(role, f"{role} {number} " * 5) for number in range(9) for role in ("user", "assistant")]
    (whole,) = encode(Conversation(tuple(turns)), tokenizer, max_length=100_000)
    (cut,) = encode(Conversation(tuple(turns)), tokenizer, max_length=200)
    assert cut.is_cut and cut.input_ids == whole.input_ids[: len(cut.input_ids)]
    assert 100 < len(cut.input_ids) <= 200 and cut.input_ids[-1] == tokenizer.end_id


def test_each_assistants_turn_has_its_end_in_the_loss(tokenizer) -> None:
    messages = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    (tokens,) = encode(Conversation(messages), tokenizer)
    learned = [token for token, counts in zip(tokens.input_ids, tokens.loss_mask, strict=True) if counts]
    end = tokenizer.end_id
    assert learned == [*tokenizer.encode(" b"), end, *tokenizer.encode(" d"), end]


def test_a_chat_templates_marks_are_single_ids_and_its_end_is_learned(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tokens,) = encode(Instruction("a", "", "b"), tokenizer, template=ChatTemplate(jinja))
    learned = [token for token, counts in zip(tokens.input_ids, tokens.loss_mask, strict=True) if counts]
    assert learned == [*tokenizer.encode("b"), tokenizer.backend.token_to_id("<|im_end|>")]


def test_a_long_text_becomes_several_documents_and_no_first_token_is_in_the_loss(tokenizer) -> None:
    text = " ".join(map(str, range(400)))
    documents = encode(Text(text), tokenizer, max_length=100)
    assert [token for document in documents for token in document.input_ids] == [
        *tokenizer.encode(text),
        tokenizer.end_id,
    ]
    assert all(not document.loss_mask[0] and all(document.loss_mask[1:]) for document in documents)
    assert all(len(document.input_ids) <= 100 and sum(document.loss_mask) for document in documents)


def test_a_record_without_anything_in_the_loss_is_told_and_never_trained_on(tokenizer) -> None:
    class Mute(PacosTemplate):
        def segments(self, record):
            return [segment._replace(in_loss=False) for segment in super().segments(record)]

    assert encode(Instruction("a", "", "b"), tokenizer, template=Mute()) == Unusable(
        "all masked: nothing of it is in the loss"
    )


def test_a_record_that_the_template_refuses_costs_that_record_alone(tokenizer) -> None:
    jinja = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('not that') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    records = [Instruction("a", "", "b"), Instruction("bad", "", "b"), Instruction("c", "", "d")]
    good, bad, other = encode_records(
        records, template=ChatTemplate(jinja), tokenizer=tokenizer, max_length=99, truncation="prompt"
    )
    assert isinstance(bad, Unusable) and "refuses this conversation: not that" in bad.reason
    assert isinstance(good, list) and isinstance(other, list)
    assert tokenizer.decode(other[0].input_ids) == "c d"
