"""Small rules of English that several kinds need: articles, lists, choice of phrasing."""

from collections.abc import Sequence
from random import Random

VOWEL_SOUNDS = tuple("aeiou")
SILENT_H = ("hour", "honest", "heir")
CONSONANT_U = ("unit", "unicorn", "universe", "university", "uniform", "use", "european", "one")


def with_article(noun: str) -> str:
    """'an apple', 'a unicorn', 'an hour'."""
    word = noun.lower()
    vowel = word.startswith(VOWEL_SOUNDS) and not word.startswith(CONSONANT_U)
    return f"{'an' if vowel or word.startswith(SILENT_H) else 'a'} {noun}"


def joined(items: Sequence[str], *, last: str = "and") -> str:
    """'a, b and c'."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def phrased(rng: Random, phrasings: Sequence[str], **fields: object) -> str:
    """One of the phrasings, filled in and starting with a capital letter."""
    return capitalised(rng.choice(phrasings).format(**fields))


def rows(table: str) -> list[list[str]]:
    """The lines of a table, each split at ' | '."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def word_list(line: str) -> list[str]:
    """The words of a line, for tables of single words."""
    return line.split()
