import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.data.chunks import Unreadable
from app.data.records import Conversation, Instruction, Invalid, Message, RowReader, Text, detect_format, split_of

ALPACA = RowReader("alpaca", special_tokens=("<|endoftext|>",))
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too


def chat(*contents: str, roles: str = "user assistant") -> dict:
    names = roles.split()
    return {"messages": [{"role": names[i % len(names)], "content": text} for i, text in enumerate(contents)]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"output": "x"}, "instruction: missing"),
        ({"instruction": "x"}, "output: missing"),
        ({"instruction": "x", "output": " "}, "output: empty"),
        ({"instruction": "x", "output": None}, "output: empty"),
        ({"instruction": "", "output": "x"}, "instruction: empty"),
        ({"instruction": "x", "output": True}, "output: not text"),
        ({"instruction": "x", "input": ["a"], "output": "y"}, "input: not text"),
        ("text", "not an object"),
        (Unreadable("{"), "not valid JSON"),
    ],
)
def test_an_invalid_record_is_refused_with_its_reason(row: object, reason: str) -> None:
    with pytest.raises(Invalid) as caught:
        ALPACA.read(row)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("row", "record", "repair"),
    [
        ({"instruction": "a", "output": 42}, Instruction("a", "", "42"), "output: a number, taken as text"),
        (
            {"instruction": "a", "output": "b\ud800"},
            Instruction("a", "", "b\ufffd"),
            "output: half a surrogate pair, replaced",
        ),
        (
            {"instruction": "a", "output": "b<|endoftext|>c"},
            Instruction("a", "", "b c"),
            "output: the tokenizer's <|endoftext|>, removed",
        ),
    ],
)
def test_what_has_one_obvious_remedy_is_repaired_and_told(row: dict, record: Instruction, repair: str) -> None:
    assert ALPACA.read(row) == (record, [repair])


@given(instruction=ANY_TEXT, input=ANY_TEXT, output=ANY_TEXT)
def test_any_text_gives_a_record_of_valid_unicode_or_a_reason(instruction: str, input: str, output: str) -> None:
    try:
        record, _ = ALPACA.read({"instruction": instruction, "input": input, "output": output})
    except Invalid as problem:
        assert not instruction.strip() or not output.strip() or "<|endoftext|>" in instruction + output, problem
        return
    for text in (record.instruction, record.input, record.output):
        text.encode()
    assert len(record.content_hash()) == 64


def test_text_is_stripped_and_a_missing_input_is_empty() -> None:
    assert ALPACA.read({"instruction": " a ", "input": None, "output": "b\n"}) == (Instruction("a", "", "b"), [])


@pytest.mark.parametrize("marker", ["<noinput>", "No input", "noinput.", "No Input Required.", "<no input>"])
def test_markers_of_no_input_are_repaired(marker: str) -> None:
    record, repairs = ALPACA.read({"instruction": "a", "input": marker, "output": "b"})
    assert (record, repairs) == (Instruction("a", "", "b"), ["input: a marker of no input, emptied"])


def test_an_input_that_only_speaks_of_no_input_is_kept() -> None:
    text = "No input device was found."
    assert ALPACA.read({"instruction": "a", "input": text, "output": "b"}) == (Instruction("a", text, "b"), [])


def test_each_format_reads_its_own_fields() -> None:
    dolly = {"instruction": "a", "context": "c", "response": "b", "category": "x"}
    assert RowReader("dolly").read(dolly)[0] == Instruction("a", "c", "b")
    prompt = {"prompt": "Q: a\nA:", "completion": " b\n"}
    assert RowReader("prompt_completion").read(prompt)[0] == Instruction("Q: a\nA:", "", " b\n")  # as written
    assert RowReader("text").read({"text": "a\nb"})[0] == Text("a\nb")
    messages = (Message("user", "a"), Message("assistant", "b"))
    assert RowReader("chat").read(chat("a", "b"))[0] == Conversation(messages)
    other = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert RowReader("chat").read(other)[0] == Conversation(messages)
    renamed = RowReader("alpaca", {"instruction": "question", "output": "answer"})
    assert renamed.read({"question": "a", "answer": "b"})[0] == Instruction("a", "", "b")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "messages: missing"),
        ({"messages": []}, "messages: not a list of messages"),
        ({"messages": "hello"}, "messages: not a list of messages"),
        ({"messages": ["hello"]}, "messages: one is not an object"),
        (chat("a", roles="user"), "messages: no assistant's turn"),
        (chat("a", "b", "c", roles="user user assistant"), "messages: user and assistant do not take turns"),
        (chat("b", roles="assistant"), "messages: user and assistant do not take turns"),
        (chat("a", "b", roles="user tool"), "messages: a role is none of system, user, assistant"),
        (chat("a", " "), "messages: an empty assistant's turn"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_refused(row: dict, reason: str) -> None:
    with pytest.raises(Invalid) as caught:
        RowReader("chat").read(row)
    assert str(caught.value) == reason


def test_a_question_without_an_answer_is_cut_off_a_conversation() -> None:
    record, repairs = RowReader("chat").read(chat("a", "b", "c"))
    assert record == Conversation((Message("user", "a"), Message("assistant", "b")))
    assert repairs == ["messages: an end without an answer, cut off"]


@pytest.mark.parametrize(
    ("rows", "format"),
    [
        ([{"instruction": "", "input": "", "output": "", "text": ""}], "alpaca"),
        ([{"instruction": "", "context": "", "response": "", "category": ""}], "dolly"),
        ([{"prompt": "", "completion": ""}], "prompt_completion"),
        ([{"messages": []}], "chat"),
        ([{"conversations": []}], "chat"),
        ([{"text": ""}], "text"),
        ([{"output": ""}, "x", {"instruction": "", "output": ""}, {"instruction": "", "output": ""}], "alpaca"),
        ([{"question": "", "answer": ""}], None),
        ([1, None], None),
    ],
)
def test_a_format_is_known_by_its_fields(rows: list, format: str | None) -> None:
    assert detect_format(rows) == format


def test_a_format_is_known_by_fields_that_were_given_other_names() -> None:
    fields = {"instruction": "question", "output": "answer"}
    assert detect_format([{"question": "", "answer": ""}], fields) == "alpaca"


def test_the_split_depends_on_content_alone_and_has_the_wanted_shares() -> None:
    hashes = [Instruction(f"question {number}", "", "answer").content_hash() for number in range(5000)]
    splits = [split_of(h, validation_fraction=0.1, test_fraction=0.05) for h in hashes]
    assert 0.08 < splits.count("validation") / 5000 < 0.12
    assert 0.035 < splits.count("test") / 5000 < 0.065
    more = [split_of(h, validation_fraction=0.3, test_fraction=0.05) for h in hashes]
    assert [s == "test" for s in more] == [s == "test" for s in splits]
    assert all(after == "validation" for before, after in zip(splits, more, strict=True) if before == "validation")


def test_the_content_hash_is_what_it_has_always_been() -> None:
    # A change would move records between training and held-out, also for models that are trained already.
    expected = "8badde10c760e9b702defb4b5e225de79c515b1d2a5cfb000e140f3c6fbb5629"
    assert Instruction("a", "b", "c").content_hash() == expected
