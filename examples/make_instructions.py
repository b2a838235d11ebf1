"""Write `instructions.jsonl`, the example data set for fine-tuning.

    python examples/make_instructions.py           write the file
    python examples/make_instructions.py --check   exit 1 if the file is not what would be written

The records come from the kinds in `instruction_kinds`: hand-written tables, joined to
several phrasings of each question. Every kind draws from its own seeded generator, so a
change to one kind leaves the records of the others as they are.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from instruction_kinds import (
    handbook,
    identity,
    knowledge,
    moods,
    numbers,
    passages,
    places,
    sentences,
    text_work,
    words,
    world,
    writing,
)
from instruction_kinds.record import Record

OUTPUT = Path(__file__).resolve().parent / "instructions.jsonl"
SEED = "pacos"

Kind = Callable[[Random], Iterator[Record]]

KINDS: tuple[Kind, ...] = (
    handbook.handbook_questions,
    handbook.unanswered_handbook_questions,
    passages.passage_questions,
    passages.filled_passage_questions,
    passages.unanswered_questions,
    identity.exchanges,
    knowledge.definitions,
    knowledge.explanations,
    knowledge.comparisons,
    knowledge.true_or_false,
    knowledge.trivia,
    moods.sentiments,
    moods.feelings,
    numbers.arithmetic,
    numbers.word_problems,
    numbers.sorted_numbers,
    numbers.compared_numbers,
    numbers.sequences,
    numbers.conversions,
    numbers.calendar,
    numbers.counting,
    numbers.clock,
    sentences.misspelt,
    sentences.unpunctuated,
    sentences.to_questions,
    sentences.to_passive,
    sentences.to_negative,
    sentences.to_polite,
    sentences.combined,
    text_work.sorted_words,
    text_work.handled_lists,
    text_work.changed_case,
    text_work.as_json,
    text_work.as_csv,
    text_work.extracted_emails,
    text_work.extracted_dates,
    text_work.extracted_names,
    text_work.extracted_amounts,
    words.antonyms,
    words.synonyms,
    words.plurals,
    words.past_tenses,
    words.rhymes,
    words.parts_of_speech,
    places.capitals,
    places.continents,
    world.animals,
    world.classified,
    world.odd_ones_out,
    world.named_members,
    world.jobs,
    world.uses,
    world.translations,
    world.blanks,
    writing.tips,
    writing.messages,
    writing.sentences_with,
    writing.summaries,
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write examples/instructions.jsonl.")
    parser.add_argument("--check", action="store_true", help="only compare the file with what would be written")
    wanted = as_json_lines(all_records())
    if not parser.parse_args().check:
        OUTPUT.write_text(wanted, encoding="utf-8")
        return 0
    if OUTPUT.exists() and OUTPUT.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{OUTPUT.name} is out of date: run python examples/make_instructions.py", file=sys.stderr)
    return 1


def all_records() -> list[Record]:
    records = [record for by_kind in records_by_kind().values() for record in by_kind]
    Random(SEED).shuffle(records)
    return records


def records_by_kind() -> dict[str, list[Record]]:
    """The records of each kind; a question that has been asked before is left out."""
    asked: set[tuple[str, str]] = set()
    by_kind: dict[str, list[Record]] = {}
    for kind in KINDS:
        kept = by_kind.setdefault(kind.__name__, [])
        for record in kind(Random(f"{SEED}:{kind.__name__}")):
            if (record.instruction, record.input) not in asked:
                asked.add((record.instruction, record.input))
                kept.append(record)
    return by_kind


def as_json_lines(records: list[Record]) -> str:
    return "".join(f"{json.dumps(record.as_dict(), ensure_ascii=False)}\n" for record in records)


if __name__ == "__main__":
    sys.exit(main())
