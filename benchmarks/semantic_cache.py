"""What the semantic cache finds, and what it must not find.

    python -m benchmarks.semantic_cache --json benchmarks/results/semantic_cache.json [--texts alpaca.json …]

Over the lists of tests/caching: pairs of questions that ask the same, and pairs that do not though they look alike. For
the gate, for the embedder at the default threshold, and for both together: how many pairs each would answer alike.
`--texts` (JSON, or JSON Lines, with `instruction` and `input`, or `prompt` or `text`) prints all texts of real users
that the gate calls the same, to be read.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.atomic import write_text
from app.caching.wording import canonical
from app.config import CacheConfig
from app.retrieval.embedding import Embedder
from benchmarks.machine import describe

LISTS = Path(__file__).parents[1] / "tests/caching"
Pair = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="*", type=Path, default=(), help="real prompts")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as a replica has it
    threshold, embedder = CacheConfig().similarity, Embedder("embedded")

    def is_alike(pair: Pair) -> bool:
        return float(np.dot(*embedder.embed(pair))) >= threshold

    def is_same(pair: Pair) -> bool:
        return canonical(pair[0]) == canonical(pair[1])

    levels: dict[str, Callable[[Pair], bool]] = {
        "gate": is_same,
        "embedder": is_alike,
        "both": lambda pair: is_same(pair) and is_alike(pair),
    }
    report: dict[str, Any] = {"machine": describe("torch", "sentence-transformers"), "threshold": threshold}
    for name in ("paraphrases", "adversarial"):
        rows = [json.loads(line) for line in (LISTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        report[name] = {level: counts(rows, is_found) for level, is_found in levels.items()}
    pairs = [(row["a"], row["b"]) for row in rows]
    report["milliseconds"] = {
        "canonical form": milliseconds(lambda pair: canonical(pair[0]), pairs),
        "two vectors": milliseconds(embedder.embed, pairs),
    }
    if arguments.texts:
        report["texts"] = show_groups({text for file in arguments.texts for text in read_texts(file)})
    print(json.dumps(report, indent=2))
    if arguments.json:
        write_text(arguments.json, json.dumps(report, indent=2) + "\n")


def counts(rows: list[dict[str, str]], is_found: Callable[[Pair], bool]) -> dict[str, Any]:
    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        kinds[row["kind"]][0] += is_found((row["a"], row["b"]))
        kinds[row["kind"]][1] += 1
    found = sum(number for number, _ in kinds.values())
    return {"found": found, "of": len(rows), "share": found / len(rows), "kinds": dict(kinds)}


def milliseconds(work: Callable[[Pair], object], pairs: list[Pair]) -> float:
    started = time.perf_counter()
    for pair in pairs:
        work(pair)
    return 1000 * (time.perf_counter() - started) / len(pairs)


def show_groups(texts: set[str]) -> dict[str, int]:
    forms = defaultdict(list)
    for text in sorted(texts):
        forms[canonical(text)].append(text)
    groups = [group for group in forms.values() if len(group) > 1]
    for group in groups:
        print(" || ".join(text.replace("\n", "\\n") for text in group))
    return {"texts": len(texts), "groups": len(groups), "found": sum(len(group) - 1 for group in groups)}


def read_texts(file: Path) -> list[str]:
    content = file.read_text(encoding="utf-8")
    rows = json.loads(content) if file.suffix == ".json" else [json.loads(line) for line in content.splitlines()]
    return [row.get("prompt") or row.get("text") or f"{row['instruction']}\n{_input(row)}".strip() for row in rows]


def _input(row: dict[str, str]) -> str:
    return row.get("input") or row.get("context") or ""


if __name__ == "__main__":
    main()
