"""Train the small static embedder that the package carries (see app/assets/embedder/README.md).

    python jobs/train_embedder.py --output app/assets/embedder alpaca_data.json dolly_15k.jsonl

Sources are instruction records (.json, .jsonl) or plain text. Every document teaches the words' company; one of several
sentences also gives a pair: one of them, be it the question or part of the answer, asks for the others (the inverse
cloze task of Lee et al. 2019, arXiv:1906.00300). Needs `pip install 'pacos[pretrain]'`, one CPU core and some minutes;
no cluster.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from app.data.corpus import read_documents
from app.errors import UserError
from app.retrieval.static_embedder import (
    Pair,
    StaticEmbedderSettings,
    save_static_embedder,
    train_static_embedder,
)

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
FEWEST_WORDS = 4
MOST_WORDS = 120
SHARE_WITH_SENTENCE = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        started = time.perf_counter()
        texts = _texts(options.sources)
        settings = StaticEmbedderSettings(
            vocab_size=options.vocab_size, width=options.width, epochs=options.epochs, seed=options.seed
        )
        pairs = sentence_pairs(texts, seed=options.seed)
        tokenizer, vectors = train_static_embedder(texts, pairs, settings=settings)
        save_static_embedder(options.output, tokenizer, vectors)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.output}: {vectors.shape[0]} tokens x {vectors.shape[1]}, {time.perf_counter() - started:.0f} s")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = StaticEmbedderSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="files to learn from")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--vocab-size", type=int, default=defaults.vocab_size)
    parser.add_argument("--width", type=int, default=defaults.width)
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="passes over the pairs")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    return parser.parse_args(arguments)


def _texts(sources: Sequence[str]) -> list[str]:
    """Each text once, in order."""
    return list(dict.fromkeys(document.text for source in sources for document in read_documents(source)))


def sentence_pairs(texts: Sequence[str], *, seed: int) -> list[Pair]:
    """A random sentence of each text of several, and the others, which now and then still hold it."""
    choose = random.Random(seed)
    pairs = []
    for text in texts:
        sentences = [sentence for sentence in SENTENCE_END.split(text) if len(sentence.split()) >= FEWEST_WORDS]
        if len(sentences) < 2:
            continue
        number = choose.randrange(len(sentences))
        others = sentences[:number] + sentences[number + 1 :]
        # else words that are in both would teach nothing, and a search lives off them
        shown = sentences if choose.random() < SHARE_WITH_SENTENCE else others
        pairs.append((sentences[number], _cut(" ".join(shown))))
    return pairs


def _cut(passage: str) -> str:
    """Passages of an index are short too."""
    return " ".join(passage.split()[:MOST_WORDS])


if __name__ == "__main__":
    raise SystemExit(main())
