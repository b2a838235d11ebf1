"""The example data set is what its generator writes, and its answers are right.

Computable answers are worked out again here from the text of each record, without the
generator's own arithmetic.
"""

import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ORDER = re.compile(r"ascending|smallest to largest|low to high|descending|largest to smallest")
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
Fields = dict[str, str]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("make_instructions")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def records() -> list[Fields]:
    lines = (EXAMPLES / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_file_is_what_the_generator_writes(generator: ModuleType) -> None:
    written = (EXAMPLES / "instructions.jsonl").read_text(encoding="utf-8")
    assert written == generator.as_json_lines(generator.all_records())


def test_check_fails_when_the_file_differs(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "OUTPUT", tmp_path / "instructions.jsonl")
    monkeypatch.setattr(sys, "argv", ["make_instructions.py", "--check"])
    assert generator.main() == 1
    monkeypatch.setattr(sys, "argv", ["make_instructions.py"])
    assert generator.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_instructions.py", "--check"])
    assert generator.main() == 0


def test_there_are_many_unique_records(records: list[Fields]) -> None:
    unique = {(record["instruction"], record["input"]) for record in records}
    assert len(unique) == len(records)
    assert 1_500 <= len(records) <= 2_000
    assert (EXAMPLES / "instructions.jsonl").stat().st_size < 600_000


def test_every_record_has_three_tidy_strings(records: list[Fields]) -> None:
    for record in records:
        assert list(record) == ["instruction", "input", "output"]
        assert all(isinstance(value, str) and value == value.strip() for value in record.values())
        assert record["instruction"] and record["output"], record
        assert not re.search(r"  |\{\w*\}|None", " ".join([record["instruction"], record["input"]])), record
        assert record["instruction"][0].isupper() and record["instruction"][-1] in ".?!", record


def test_articles_agree_with_the_next_word(records: list[Fields]) -> None:
    for record in records:
        if record["instruction"].startswith(("Correct", "Find and fix", "Rewrite the sentence without")):
            continue
        text = " ".join(record.values())
        assert not re.search(r"\b[Aa] (?!one\b|unit|uni|use|eu)[aeiou]", text), record
        assert not re.search(r"\b[Aa]n (?!hour|honest|heir)[b-df-hj-np-tv-z]", text), record


def test_no_kind_is_more_than_twelve_percent(generator: ModuleType) -> None:
    sizes = {kind: len(kept) for kind, kept in generator.records_by_kind().items()}
    assert len(sizes) >= 25
    assert min(sizes.values()) > 0
    assert max(sizes.values()) <= 0.12 * sum(sizes.values())


def test_arithmetic_is_right(records: list[Fields]) -> None:
    checked = 0
    for record in records:
        asked = re.search(r"(\d+) (\+|-|×|plus|minus|times|divided by) (\d+)", record["instruction"])
        if not asked:
            continue
        a, sign, b = int(asked[1]), asked[2], int(asked[3])
        if sign in ("+", "plus"):
            answer = a + b
        elif sign in ("-", "minus"):
            answer = a - b
        elif sign in ("×", "times"):
            answer = a * b
        else:
            answer, remainder = divmod(a, b)
            assert remainder == 0, record
        assert last_number(record["output"]) == answer, record
        checked += 1
    assert checked >= 40


def test_word_problems_are_right(records: list[Fields]) -> None:
    rules = [
        (r"buys (\d+) more|in the next\.|pages on Tuesday", lambda a, b: a + b),
        (r"gives \d+ of them|sells \d+ of them|people get off", lambda a, b: a - b),
        (r"books in each box|ticket costs|kilometres every day|A spider has", lambda a, b: a * b),
        (r"equally among|eggs into boxes", lambda a, b: a // b),
    ]
    checked = 0
    for record in records:
        given = [int(number) for number in re.findall(r"\d+", record["instruction"])]
        for pattern, rule in rules:
            if len(given) == 2 and re.search(pattern, record["instruction"]):
                assert last_number(record["output"]) == rule(*given), record
                checked += 1
    assert checked >= 25


def test_sorted_numbers_are_sorted(records: list[Fields]) -> None:
    checked = [record for record in records if ORDER.search(record["instruction"])]
    for record in checked:
        descending = re.search(r"descending|largest to smallest", record["instruction"]) is not None
        given = [int(number) for number in record["input"].split(", ")]
        answer = [int(number) for number in record["output"].split(", ")]
        assert answer == sorted(given, reverse=descending), record
    assert len(checked) >= 15


def test_sorted_words_are_sorted(records: list[Fields]) -> None:
    checked = [record for record in records if re.search(r"alphabetical", record["instruction"])]
    for record in checked:
        assert record["output"].split(", ") == sorted(record["input"].split(", ")), record
    assert len(checked) >= 15


def test_compared_numbers_are_right(records: list[Fields]) -> None:
    checked = 0
    for record in records:
        asked = re.search(r"(larger|smaller|largest|smallest)\b.*(\blist|\d+ or \d+)", record["instruction"])
        if not asked:
            continue
        given = [int(number) for number in re.findall(r"\d+", record["instruction"] + record["input"])]
        answer = max(given) if asked[1].startswith("larg") else min(given)
        assert int(re.findall(r"\d+", record["output"])[0]) == answer, record
        checked += 1
    assert checked >= 15


def test_counts_of_letters_and_words_are_right(records: list[Fields]) -> None:
    checked: Counter[str] = Counter()
    for record in records:
        if match := re.fullmatch(r"How many letters are in the word '(\w+)'\?", record["instruction"]):
            assert NUMBERS[len(match[1])] in record["output"].split(), record
            checked["letters"] += 1
        elif match := re.fullmatch(r"How many times does the letter '(\w)' occur in '(\w+)'\?", record["instruction"]):
            times = {1: "once", 2: "twice", 3: "three times", 4: "four times"}[match[2].count(match[1])]
            assert f"occurs {times} in" in record["output"], record
            checked["occurrences"] += 1
        elif re.search(r"words (are in this|in the) sentence", record["instruction"]):
            assert NUMBERS[len(record["input"].split())] in record["output"].split(), record
            checked["words"] += 1
    assert set(checked) == {"letters", "occurrences", "words"}


def test_json_answers_parse_and_hold_the_given_values(records: list[Fields]) -> None:
    checked = [record for record in records if "JSON" in record["instruction"]]
    for record in checked:
        for key, value in json.loads(record["output"]).items():
            assert str(value) in record["input"], record
            assert key in ("name", "age", "city") or key in record["input"].lower(), record
    assert len(checked) >= 10


def test_handbook_passages_stand_in_a_document(generator: ModuleType) -> None:
    documents = [path.read_text(encoding="utf-8") for path in sorted((EXAMPLES / "documents").glob("*.md"))]
    by_kind = generator.records_by_kind()
    asked = by_kind["handbook_questions"] + by_kind["unanswered_handbook_questions"]
    assert len(documents) == 12
    assert len(asked) >= 150
    for record in asked:
        assert any(record.input in document for document in documents), record
        assert record.input[-1] in ".!?", record


def test_numbers_in_handbook_answers_stand_in_the_passage(generator: ModuleType) -> None:
    for record in generator.records_by_kind()["handbook_questions"]:
        for number in re.findall(r"\d[\d.,]*\d|\d", record.output):
            assert number in record.input, record


def last_number(text: str) -> int:
    return int(re.findall(r"\d+", text)[-1])
