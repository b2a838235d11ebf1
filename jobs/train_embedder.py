"""Train the small static embedder that the package carries (see app/assets/embedder/README.md).

    python jobs/train_embedder.py --output app/assets/embedder alpaca_data.json dolly_15k.jsonl

Sources are instruction records (.json, .jsonl) or plain text. Every document teaches the words' company; one of several
paragraphs also gives a pair: its first paragraph, an instruction or a heading, asks, and the rest answers. Needs no
cluster: one CPU core and a few minutes.
"""

import argparse
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        started = time.perf_counter()
        texts = _texts(options.sources)
        settings = StaticEmbedderSettings(
            vocab_size=options.vocab_size, width=options.width, epochs=options.epochs, seed=options.seed
        )
        tokenizer, vectors = train_static_embedder(texts, _pairs(texts), settings=settings)
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


def _pairs(texts: Sequence[str]) -> list[Pair]:
    parts = [text.split("\n\n", 1) for text in texts]
    return [(first, rest[0]) for first, *rest in parts if rest and first.strip() and rest[0].strip()]


if __name__ == "__main__":
    raise SystemExit(main())
