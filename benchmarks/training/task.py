"""What every contender trains: the same model, records, groups of 16, technique and learning rate.

    FOLDER/task.json      the figures below
    FOLDER/model          GPT-2 124M, random weights, by `save_pretrained` of `transformers`; GPT-2's tokenizer
    FOLDER/records.json   the source's first records, as many as are trained on and those held out among them
    FOLDER/padded         they, prepared by `pacos prepare`, one a row
    FOLDER/packed         the same records, packed into rows of `packed_length` tokens
    FOLDER/groups.json    the groups of 16 that each step trains on, and the held-out records, for peers

`Feed` deals out the padded rows; the groups are what it makes of them, so that a step of a peer computes exactly the
records that a step of Pacos computes on padded rows. Packed rows hold several records each, mixed by length over the
whole set, as `pacos prepare` packs them: there a step takes as many rows as hold 16 records on average. Over a pass
all compute the same records; for so few, rows are shorter than the 1,024 tokens that the layout takes by default, for
at 10 records a row there would be no whole number of rows near 16.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RECORDS_PER_STEP = 16
MAX_LENGTH = 512
RANK, ALPHA = 8, 16
LEARNING_RATE = 1e-3
VALIDATION_FRACTION = 0.1
SEED = 0
TASK_FILE = "task.json"


@dataclass(frozen=True)
class Task:
    folder: str
    steps: int
    """Measured steps in a pass over the records; one more before them warms caches up."""
    passes: int
    """Of the fast contenders; the others make one."""
    threads: int
    packed_length: int = MAX_LENGTH
    """Tokens in a packed row."""

    @property
    def num_records(self) -> int:
        return (1 + self.steps) * RECORDS_PER_STEP

    def total_steps(self, *, is_fast: bool) -> int:
        """Of a run, the warm-up with them."""
        return 1 + self.steps * (self.passes if is_fast else 1)

    def path(self, name: str) -> Path:
        return Path(self.folder) / name


def read_task(folder: str) -> Task:
    return Task(**json.loads((Path(folder) / TASK_FILE).read_text()))


def make_inputs(task: Task, *, source: str, tokenizer: str) -> dict[str, Any]:
    """Fill the task's folder; returns what the records are. Starts Ray, which `pacos prepare` runs on."""
    task.path(TASK_FILE).write_text(json.dumps(asdict(task), indent=2) + "\n")
    _make_model(task.path("model"), tokenizer=tokenizer)
    records = _select(source, task.num_records)
    task.path("records.json").write_text(json.dumps(records))
    _prepare(task)
    _write_groups(task)
    return describe_records(task)


def _make_model(folder: Path, *, tokenizer: str) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    if not (folder / "model.safetensors").exists():
        torch.manual_seed(SEED)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(Path(tokenizer) / name, folder / name)


def _select(source: str, count: int) -> list[Any]:
    """The source's first rows, until `count` of them are for training; what is invalid or a copy is left out."""
    from app.data.chunks import read_rows
    from app.data.records import Invalid, RowReader, split_of

    reader, seen, chosen, trained = RowReader("alpaca"), set(), [], 0
    for row in read_rows(Path(source)):
        try:
            content = reader.read(row)[0].content_hash()
        except Invalid:
            continue
        if content in seen:
            continue
        seen.add(content)
        chosen.append(row)
        trained += split_of(content, validation_fraction=VALIDATION_FRACTION) == "train"
        if trained == count:
            return chosen
    raise SystemExit(f"--source={source!r} holds {trained} records to train on, and {count} are needed; lower --steps")


def _prepare(task: Task) -> None:
    """Both layouts, unless they are there from the last time; Ray starts only where there is something to do."""
    from app.data.prepare import plan_preparation, prepare
    from app.ray_cluster import connected

    configs = [_prepare_config(task, layout) for layout in ("padded", "packed")]
    missing = [config for config in configs if plan_preparation(config).finished() is None]
    if missing:
        with connected(None):
            for config in missing:
                manifest = prepare(config)
                assert manifest.num_records("train") == task.num_records, "prepared other records than were chosen"


def _prepare_config(task: Task, layout: str) -> Any:
    from app.config import PrepareConfig
    from app.config.data import PackedLayout, PaddedLayout

    return PrepareConfig(
        source=str(task.path("records.json")),
        output=str(task.path(layout)),
        model=str(task.path("model")),
        format="alpaca",
        layout=PackedLayout(length=task.packed_length) if layout == "packed" else PaddedLayout(),
        max_length=MAX_LENGTH,
        validation_fraction=VALIDATION_FRACTION,
    )


def feed_of(task: Task, layout: str, *, total_steps: int) -> Any:
    """The `Feed` that deals out the rows of `padded` or `packed` data, by steps of 16 records on average."""
    from app.data.feed import Feed
    from app.data.shards import read_manifest

    manifest = read_manifest(str(task.path(layout)))
    return Feed.of(manifest, batch_size=rows_per_step(task, layout), total_steps=total_steps, seed=SEED)


def rows_per_step(task: Task, layout: str) -> int:
    """As many as hold 16 records on average."""
    from app.data.shards import read_manifest

    manifest = read_manifest(str(task.path(layout)))
    return max(1, round(RECORDS_PER_STEP * manifest.num_rows("train") / manifest.num_records("train")))


def _write_groups(task: Task) -> None:
    from app.data.shards import read_manifest

    feed = feed_of(task, "padded", total_steps=task.total_steps(is_fast=True))
    rows = [row for window in feed.windows() for row in _labelled(feed.read(window))]
    groups = [rows[first : first + RECORDS_PER_STEP] for first in range(0, len(rows), RECORDS_PER_STEP)]
    held_out = _labelled(read_manifest(str(task.path("padded"))).read("validation"))
    task.path("groups.json").write_text(json.dumps({"steps": groups, "held_out": held_out}))


def _labelled(table: Any) -> list[dict[str, list[int]]]:
    """Rows as `transformers` takes them: the label of what is not in the loss is -100."""
    from app.data.batches import IGNORED

    pairs = zip(table["input_ids"].to_pylist(), table["loss_mask"].to_pylist(), strict=True)
    return [
        {"input_ids": ids, "labels": [token if is_in else IGNORED for token, is_in in zip(ids, mask, strict=True)]}
        for ids, mask in pairs
    ]


def read_groups(task: Task) -> tuple[list[list[dict[str, list[int]]]], list[dict[str, list[int]]]]:
    """The rows of each step, and the held-out ones."""
    stored = json.loads(task.path("groups.json").read_text())
    return stored["steps"], stored["held_out"]


def describe_records(task: Task) -> dict[str, Any]:
    """What there is to train on, and what a token of it costs."""
    from app.data.shards import read_manifest
    from benchmarks.training.flops import GPT2, lora_step_flops

    groups, held_out = read_groups(task)
    rows = [row for group in groups[: 1 + task.steps] for row in group]
    lengths = [len(row["input_ids"]) for row in rows]
    answers = [sum(label >= 0 for label in row["labels"]) for row in rows]
    packed = read_manifest(str(task.path("packed")))
    packed_rows = rows_per_step(task, "packed")
    return {
        "records": len(rows),
        "held_out": len(held_out),
        "records_per_step": RECORDS_PER_STEP,
        "tokens": sum(lengths),
        "tokens_in_loss": sum(answers),
        "longest": max(lengths),
        "packed_rows_per_step": packed_rows,
        "packed_records_per_step": round(packed_rows * packed.num_records("train") / packed.num_rows("train"), 2),
        "flops_per_token": lora_step_flops(GPT2, lengths, answers=sum(answers), rank=RANK) / sum(lengths),
    }
