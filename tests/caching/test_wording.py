"""The gate of the semantic cache: no two questions that differ in meaning may have one canonical form."""

import json
import re
import time
from collections import defaultdict
from pathlib import Path

import pytest

from app.caching.wording import LONGEST, _without_end, canonical, is_about_words

Pair = tuple[str, str]


def read_pairs(name: str) -> list[Pair]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return [(row["a"], row["b"]) for row in map(json.loads, lines)]


ADVERSARIAL, PARAPHRASES = read_pairs("adversarial.jsonl"), read_pairs("paraphrases.jsonl")
TEXTS = sorted({text for pair in ADVERSARIAL + PARAPHRASES for text in pair})


def test_no_adversarial_pair_has_one_form():
    assert len(set(ADVERSARIAL)) >= 200
    assert [pair for pair in ADVERSARIAL if canonical(pair[0]) == canonical(pair[1])] == []


def test_most_paraphrases_have_one_form():
    assert len(set(PARAPHRASES)) >= 100
    same = sum(canonical(a) == canonical(b) for a, b in PARAPHRASES)
    assert same / len(PARAPHRASES) > 0.7


def test_no_two_texts_of_the_lists_have_one_form_unless_they_are_listed_as_paraphrases():
    """Not only the pairs: each text against each other one, those of chains of paraphrases included."""
    parent = {text: text for text in TEXTS}

    def root(text: str) -> str:
        while parent[text] != text:
            text = parent[text]
        return text

    for a, b in PARAPHRASES:
        parent[root(a)] = root(b)
    forms = defaultdict(set)
    for text in TEXTS:
        forms[canonical(text)].add(root(text))
    # what the adversarial pairs hold in two ways of writing, each beside another partner
    known = {"what can I buy for 7 dollars", "what is 5", "what is 5!"}
    assert {form for form, roots in forms.items() if len(roots) > 1} == known


@pytest.mark.parametrize(
    ("pattern", "changed"),
    [
        (r"\d", lambda digit: str((int(digit) + 1) % 10)),
        (r"\b(?:is|are|was|were|do|does|did|can|should|will)\b", lambda verb: f"{verb} not"),
        (r"(?<=[a-z,] )[A-Z]\w+", lambda name: f"{name}land"),
        (r"(?<=[a-z,] )[A-Z]\w+", str.lower),
        (r"\b(?:before|in)\b", lambda _: "after"),
        (r"\b(?:a|an)\b", lambda _: "the"),
        (r"\bthe\b", lambda _: "every"),
        (r"\b(?:from|into|to)\b", lambda _: "without"),
        (r"\b(?:is|are)\b", lambda _: "would be"),
        (r"\b(?:my|your|his|her)\b", lambda _: "their"),
        (r"\b(?:two|three|four|five|six|seven|eight|ten)\b", lambda _: "nine"),
        (r"\w+(?=\W*$)", lambda word: f"{word}less"),
    ],
)
def test_one_changed_word_changes_the_form(pattern, changed):
    texts = [text for text in TEXTS if re.search(pattern, text)]
    assert len(texts) > 5
    for text in texts:
        form = canonical(text)
        for match in re.finditer(pattern, text):
            other = text[: match.start()] + changed(match[0]) + text[match.end() :]
            assert canonical(other) != form, (text, other)


def test_words_in_another_order_are_another_question():
    """Neighbours change places, unless one of them is a frame's or the sides of a comparison change."""
    symmetric = re.compile(r"difference between|distance between|differ from|[Cc]ompare")
    for text in TEXTS:
        words, form = text.split(" "), canonical(text)
        for place in range(1, len(words) - 2):
            swapped = [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
            if swapped != words and not symmetric.search(text):
                assert canonical(" ".join(swapped)) != form, (text, swapped)


def test_final_marks_and_a_questions_first_capital_count_for_nothing():
    assert canonical("what is the capital of France") == canonical("What is the capital of France?")
    assert canonical("") == "" and canonical("  ") == "" and canonical("?") != canonical("!")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Summarize this text: A 'b'  c.", "Summarize this text: A 'b' c."),
        ("Sort:\n3\n1", "Sort:\n3\n 1"),
        ("What does `x = 1_000` do?", "What does `x = 1000` do?"),
        ("What is f(seven)?", "What is f(7)?"),
        ("What is f(x)?", "What is f (x)?"),
        ("Compare cats and dogs: the former first.", "Compare dogs and cats: the former first."),
        ("Reply to “I can't”", "Reply to “I cannot”"),
        ("What is 2³?", "What is 23?"),
        ("¿Qué es el tiempo?", "Qué es el tiempo?"),
    ],
)
def test_material_stays_as_it_is(a, b):
    assert canonical(a) != canonical(b)


def test_where_words_are_the_subject_no_word_is_rewritten():
    for text in ("How many letters has colour?", "Please repeat what I say.", "What rhymes with seven?"):
        assert is_about_words(text) and canonical(text) == text


def test_a_long_text_stands_for_itself_and_any_text_is_read_in_linear_time():
    assert canonical("Please " * LONGEST) == "Please " * LONGEST
    for part in ("please ", "the ", "how is a from ", "1,000", "and ", "' ", "what is the x's "):
        canonical(part * (LONGEST // len(part)))


def test_real_instructions_of_one_form_are_the_same_question(shared_data):
    """16,000 instructions of Alpaca: those of one form agree in all that a crude look at them finds. They are few, and
    have been read."""
    rows = json.loads((shared_data / "alpaca/alpaca_data.json").read_text())
    texts = {f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"] for row in rows}
    forms = defaultdict(list)
    for text in texts:
        forms[canonical(text)].append(text)
    groups = [group for group in forms.values() if len(group) > 1]
    telling = re.compile(r"\d+|\b(?:not|no|never|all|some|any|more|less|most|least|first|last|before|after|was|were)\b")
    assert 0 < len(groups) < 30
    assert [group for group in groups if len({tuple(telling.findall(text)) for text in group}) > 1] == []


def test_a_run_of_marks_in_the_middle_is_read_once() -> None:
    text = f"what is it{'.' * 3990}x"
    started = time.process_time()
    for _ in range(20):
        canonical(text)
    assert time.process_time() - started < 5, "begun anew at each mark it took a second each"


@pytest.mark.parametrize(
    ("asked", "end"), [("5!.", "5!"), ("Wow!.?", "Wow"), ("Wow!!", "Wow!!"), ("n!", "n!"), ("x. ", "x"), ("?", "")]
)
def test_marks_at_the_end_go_but_for_factorials(asked: str, end: str) -> None:
    assert _without_end(asked) == end
