import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from app.config import PrepareConfig
from app.data.chunks import read_rows
from app.data.encoding import encode_records
from app.data.prepare import plan_preparation, prepare
from app.data.prompts import PacosTemplate, template_from_json
from app.data.records import RowReader, split_of
from app.data.shards import Manifest, read_manifest
from app.data.tokenization import load_tokenizer
from app.errors import UserError

pytestmark = pytest.mark.ray


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tiny_model: Path, source: str | tuple[str, ...], output: Path, **values) -> PrepareConfig:
    defaults = {"model": str(tiny_model), "max_length": 96, "validation_fraction": 0.1, "records_per_shard": 60}
    return PrepareConfig.model_validate({"source": source, "output": str(output), **defaults, **values})


def rejected(folder: Path) -> list[tuple]:
    rows = pq.read_table(folder / "rejected.parquet").to_pylist()
    return [(row["row"], row["action"], row["reason"]) for row in rows]


def documents(manifest: Manifest, split: str) -> list[tuple[list[int], list[bool]]]:
    found = []
    for row in manifest.read(split).to_pylist():
        start = 0
        for length in row["lengths"]:
            found.append((row["input_ids"][start : start + length], row["loss_mask"][start : start + length]))
            start += length
        assert start == len(row["input_ids"]) == len(row["loss_mask"])
    return found


def hashes(manifest: Manifest) -> list[str]:
    return [shard["sha256"] for shard in manifest.values["shards"]]


def test_shards_hold_exactly_the_tokenized_records(small_data: Path, small_source: Path, tiny_model: Path) -> None:
    reader = RowReader("alpaca")
    records = [reader.read(row)[0] for row in read_rows(small_source)]
    encoded = encode_records(
        records,
        template=PacosTemplate(),
        tokenizer=load_tokenizer(tiny_model),
        max_length=96,
        truncation="prompt",
    )
    expected: dict[str, list] = {"train": [], "validation": []}
    for record, (tokens,) in zip(records, encoded, strict=True):
        split = split_of(record.content_hash(), validation_fraction=0.1)
        expected[split].append((tokens.input_ids, tokens.loss_mask))
    manifest = read_manifest(str(small_data))
    assert documents(manifest, "validation") == expected["validation"]  # in the order of the source
    assert sorted(documents(manifest, "train")) == sorted(expected["train"]) != documents(manifest, "train")
    assert manifest.num_records("train") == len(expected["train"]) > 0


def test_packed_rows_hold_the_same_documents_and_waste_little(
    ray_cluster: None, tiny_model: Path, small_source: Path, small_data: Path, tmp_path: Path
) -> None:
    layout = {"type": "packed", "length": 256}
    packed = prepare(config(tiny_model, str(small_source), tmp_path / "p", layout=layout))
    padded = read_manifest(str(small_data))
    assert sorted(documents(packed, "train")) == sorted(documents(padded, "train"))
    assert documents(packed, "validation") == documents(padded, "validation")
    assert packed.num_rows("validation") == packed.num_records("validation")
    fill = packed.values["splits"]["train"]["tokens"] / (256 * packed.num_rows("train"))
    assert packed.num_records("train") > 2 * packed.num_rows("train") and fill > 0.9
    assert all(len(row["input_ids"]) <= 256 for row in packed.read("train").to_pylist())


def test_no_record_is_lost_silently(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    good = [{"instruction": f"question {number}", "output": "answer"} for number in range(100)]
    rows = [
        *good[:50],
        {"output": "x"},
        {"instruction": "c", "output": ""},
        good[3],
        {"instruction": "d", "input": "<noinput>", "output": "e"},
        {"instruction": "long " * 200, "output": "f"},
        *good[50:],
    ]
    source = write(tmp_path / "mixed.jsonl", rows)
    with Path(source).open("a") as stream:
        stream.write("not json\n")
    manifest = prepare(config(tiny_model, source, tmp_path / "o"))
    assert rejected(tmp_path / "o") == [
        (50, "dropped", "instruction: missing"),
        (51, "dropped", "output: empty"),
        (52, "dropped", "duplicate"),
        (53, "repaired", "input: a marker of no input, emptied"),
        (54, "repaired", "longer than max_length=96, cut"),
        (105, "dropped", "not valid JSON"),
    ]
    records = pq.read_table(tmp_path / "o/rejected.parquet")["record"].to_pylist()
    assert json.loads(records[1]) == rows[51] and records[-1] == "not json"
    kept = sum(manifest.num_records(split) for split in ("train", "validation", "test"))
    assert kept + sum(manifest.values["rejected"].values()) == manifest.values["rows"] == 106


def test_what_to_do_with_invalid_records_is_a_setting(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"instruction": str(n), "output": "a"} for n in range(40)]
    source = write(tmp_path / "s.jsonl", [*rows, {"instruction": "x", "input": "<noinput>", "output": "b"}])
    dropped = prepare(config(tiny_model, source, tmp_path / "d", on_invalid="drop"))
    assert dropped.values["rejected"] == {"input: a marker of no input, emptied": 1} and not dropped.values["repaired"]
    with pytest.raises(UserError, match="row 40: input: a marker of no input.*on_invalid='fail'"):
        prepare(config(tiny_model, source, tmp_path / "f", on_invalid="fail"))
    assert not (tmp_path / "f").exists()


def test_too_many_invalid_records_stop_the_job_with_a_table_and_nothing_is_lost(
    ray_cluster: None, tiny_model: Path, small_source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o"
    before = prepare(config(tiny_model, str(small_source), output)).values
    rows = [{"instruction": str(n), "output": "" if n % 10 == 0 else "a"} for n in range(100)]
    source = write(tmp_path / "bad.jsonl", [*rows, {"output": "x"}])
    with pytest.raises(UserError) as caught:
        prepare(config(tiny_model, source, output))
    message = str(caught.value)
    assert "11 of 101 records (10.9%) are not valid, and max_rejected=0.05" in message
    assert "10  output: empty, first in bad.jsonl row 0" in message
    assert "1  instruction: missing, first in bad.jsonl row 100" in message
    assert read_manifest(str(output)).values == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "o"]
    assert prepare(config(tiny_model, source, output, max_rejected=0.2)).values["rows"] == 101


def test_too_long_records_count_where_they_are_dropped(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "s.jsonl", [{"instruction": f"{n} " * 100, "output": "a"} for n in range(10)])
    with pytest.raises(UserError, match="10  longer than max_length=96, first"):
        prepare(config(tiny_model, source, tmp_path / "o", truncation="drop"))
    with pytest.raises(UserError, match="no record among 10 is valid"):
        prepare(config(tiny_model, source, tmp_path / "o", truncation="drop", max_rejected=1))


def test_copies_are_dropped_wherever_they_lie_and_never_straddle_the_splits(
    ray_cluster: None, tiny_model: Path, small_source: Path, small_data: Path, tmp_path: Path
) -> None:
    rows = list(read_rows(small_source))
    sources = (write(tmp_path / "a.jsonl", rows * 2), write(tmp_path / "b.jsonl", rows[::-1]))
    once = prepare(config(tiny_model, sources, tmp_path / "o", records_per_shard=70))
    assert once.values["rejected"] == {"duplicate": 400}
    assert sorted(documents(once, "train")) == sorted(documents(read_manifest(str(small_data)), "train"))
    kept = prepare(config(tiny_model, sources, tmp_path / "k", duplicates="keep", test_fraction=0.1))
    assert kept.values["rejected"] == {}
    of_split = {split: Counter(map(str, documents(kept, split))) for split in ("train", "validation", "test")}
    assert sum(len(counter) for counter in of_split.values()) == len(set().union(*of_split.values()))
    assert all(count % 3 == 0 for counter in of_split.values() for count in counter.values())
    assert all(of_split.values())


def test_the_same_source_gives_the_same_shards_whatever_the_cluster_does(
    ray_cluster: None, tiny_model: Path, small_source: Path, tmp_path: Path
) -> None:
    import ray.data

    made = {"layout": {"type": "packed", "length": 128}, "records_per_shard": 25}
    first = prepare(config(tiny_model, str(small_source), tmp_path / "1", **made))
    context = ray.data.DataContext.get_current()
    limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = limits.copy(cpu=1)  # one task at a time, instead of six
    try:
        second = prepare(config(tiny_model, str(small_source), tmp_path / "2", **made))
    finally:
        context.execution_options.resource_limits = limits
    assert hashes(first) == hashes(second)
    other_seed = prepare(config(tiny_model, str(small_source), tmp_path / "3", **made, seed=1))
    assert hashes(first) != hashes(other_seed)
    assert sorted(documents(first, "train")) == sorted(documents(other_seed, "train"))


def test_a_second_run_does_nothing_until_something_changes(
    ray_cluster: None, tiny_model: Path, small_source: Path, tmp_path: Path
) -> None:
    source = tmp_path / "s.jsonl"
    source.write_text(small_source.read_text())
    of_run = config(tiny_model, str(source), tmp_path / "o")
    prepare(of_run)
    stamp = (tmp_path / "o/manifest.json").stat().st_mtime_ns
    assert plan_preparation(of_run).finished() is not None
    prepare(of_run)
    assert (tmp_path / "o/manifest.json").stat().st_mtime_ns == stamp
    assert plan_preparation(of_run.model_copy(update={"seed": 1})).finished() is None
    (tmp_path / "o/train/00000.parquet").unlink()
    assert plan_preparation(of_run).finished() is None
    prepare(of_run)
    assert (tmp_path / "o/train/00000.parquet").exists()
    with source.open("a") as stream:
        stream.write('{"instruction": "new", "output": "record"}\n')
    assert prepare(of_run).values["rows"] == 201


def test_formats_of_several_files_are_told_apart(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    sources = (
        write(tmp_path / "1.jsonl", [{"instruction": "a", "output": "b"}]),
        write(tmp_path / "2.jsonl", [{"instruction": "a", "context": "c", "response": "b"}]),
        write(tmp_path / "3.jsonl", [{"prompt": "a", "completion": "c"}]),
        write(tmp_path / "4.jsonl", [chat]),
        write(tmp_path / "5.jsonl", [{"text": "some text"}]),
    )
    manifest = prepare(config(tiny_model, sources, tmp_path / "o", validation_fraction=0))
    formats = [source["format"] for source in manifest.values["sources"]]
    assert formats == ["alpaca", "dolly", "prompt_completion", "chat", "text"]
    assert manifest.num_records("train") == 5
    unknown = write(tmp_path / "6.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(UserError, match="the fields answer, question, which no format has.*fields="):
        prepare(config(tiny_model, unknown, tmp_path / "u"))
    for name, format in (("inputs", "auto"), ("context", "alpaca")):
        with pytest.raises(ValueError, match=rf"fields\.{name}: format={format} has no such field; it has .*input"):
            config(tiny_model, unknown, tmp_path / "u", fields={name: "ctx"}, format=format)
    fields = {"instruction": "question", "output": "answer"}
    assert (
        prepare(config(tiny_model, unknown, tmp_path / "u", fields=fields, validation_fraction=0)).values["rows"] == 1
    )


def test_the_template_travels_in_the_manifest(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "s.jsonl", [{"instruction": "a", "output": "b"}])
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = {"type": "chat", "file": str(tmp_path / "chat.jinja")}
    manifest = prepare(config(tiny_model, source, tmp_path / "o", template=template, validation_fraction=0))
    (tmp_path / "chat.jinja").unlink()
    stored = template_from_json(read_manifest(str(tmp_path / "o")).values["template"])
    assert stored.prompt("a") == "user: a\nassistant: "
    ((ids, mask),) = documents(manifest, "train")
    tokenizer = load_tokenizer(tiny_model)
    assert tokenizer.decode(ids[: mask.count(False)]) == "user: a\nassistant: "


def test_a_folder_of_something_else_is_not_replaced(tiny_model: Path, small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="name another folder"):
        prepare(config(tiny_model, str(small_source), tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.chaos
def test_a_kill_at_any_moment_leaves_the_old_data_or_the_new_or_none(
    ray_cluster: None, tiny_model: Path, small_source: Path, tmp_path: Path
) -> None:
    """Five processes that prepare to the same folder, each killed at a random moment, Ray and all."""
    import ray

    output = tmp_path / "o"
    code = (
        "import sys, ray, json\n"
        "from app.config import PrepareConfig\n"
        "from app.data.prepare import prepare\n"
        "ray.init(address=sys.argv[1], log_to_driver=False, logging_level=50)\n"
        "for seed in range(10_000):\n"
        "    prepare(PrepareConfig(**json.loads(sys.argv[2]), seed=seed))\n"
        "    print('prepared', flush=True)\n"
    )
    values = config(tiny_model, str(small_source), output, records_per_shard=40).model_dump(mode="json")
    del values["seed"]
    address = ray.get_runtime_context().gcs_address
    moments = random.Random(0)
    outcomes = Counter()
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, address, json.dumps(values)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        assert process.stdout and process.stdout.readline() == b"prepared\n"
        time.sleep(moments.uniform(0, 1.5))  # in the midst of the second or the third
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = [path for path in tmp_path.iterdir() if path != output]
        outcomes["killed at work" if left else "killed between"] += 1
        if (output / "manifest.json").exists():  # else it was killed between two renames
            manifest = read_manifest(str(output))  # raises where a shard is missing
            assert len(documents(manifest, "train")) == manifest.num_records("train")
    assert outcomes["killed at work"] >= 2, outcomes
    prepare(config(tiny_model, str(small_source), output))
    assert [path.name for path in tmp_path.iterdir()] == ["o"], "what killed processes left behind is cleared away"
