import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from app.atomic import replaced_folder
from app.config import PrepareConfig
from app.data.records import is_held_out_hash, read_rows, validate_row
from app.data.shards import prepare, read_manifest, tokenize_record
from app.data.tokenization import load_tokenizer
from app.errors import UserError

pytestmark = pytest.mark.ray


def test_shards_hold_exactly_the_tokenized_records_in_order(
    small_data: Path, small_source: Path, tiny_model: Path
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    expected: dict[str, list] = {"train": [], "validation": []}
    for row in read_rows(str(small_source)):
        record = validate_row(row)
        tokens = tokenize_record(record, tokenizer, max_length=96)
        if tokens is not None:
            held_out = is_held_out_hash(record.content_hash(), fraction=0.1)
            expected["validation" if held_out else "train"].append((tokens.input_ids, tokens.loss_mask))
    manifest = read_manifest(str(small_data))
    for split, records in expected.items():
        rows = [row for file in manifest.files(split) for row in pq.read_table(file).to_pylist()]
        assert [(row["input_ids"], row["loss_mask"]) for row in rows] == records
        assert manifest.num_records(split) == len(records) > 0


def test_rejected_records_are_kept_with_row_and_reason(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "mixed.jsonl"
    rows = [{"instruction": "a", "output": "b"}, {"output": "x"}, {"instruction": "c", "output": ""}]
    source.write_text("\n".join(map(json.dumps, rows)))
    manifest = prepare(PrepareConfig(source=str(source), output=str(tmp_path / "o"), model=str(tiny_model)))
    rejected = [json.loads(line) for line in (tmp_path / "o/rejected.jsonl").read_text().splitlines()]
    assert rejected == [{"row": 1, "reason": "instruction: missing"}, {"row": 2, "reason": "output: empty"}]
    assert manifest.values["rejected"] == {"instruction: missing": 1, "output: empty": 1}


def test_preparing_anew_replaces_the_old_and_a_failure_keeps_it(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"instruction": "a", "output": "b"}')
    bad.write_text('{"text": "no instruction"}')
    output = tmp_path / "data"
    config = PrepareConfig(source=str(good), output=str(output), model=str(tiny_model), validation_fraction=0)
    first = prepare(config).values
    with pytest.raises(UserError, match="no valid record among 1; reasons: instruction: missing"):
        prepare(config.model_copy(update={"source": str(bad)}))
    assert read_manifest(str(output)).values == first == prepare(config).values
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "data", "good.jsonl"]


def test_a_folder_of_something_else_is_not_replaced(
    ray_cluster: None, tiny_model: Path, small_source: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="name another folder"):
        prepare(PrepareConfig(source=str(small_source), output=str(tmp_path), model=str(tiny_model)))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_folder_that_holds_more_than_prepared_data_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "documents.sqlite").write_text("an index")
    with (
        pytest.raises(UserError, match="holds 'documents.sqlite', which is not ours"),
        replaced_folder(tmp_path, contents=["manifest.json", "train"]),
    ):
        pass
    assert (tmp_path / "documents.sqlite").exists()
    with pytest.raises(UserError, match="is not of prepared data"):
        read_manifest(str(tmp_path))


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "new", contents=["secret"]) as staging:
        (staging / "secret").touch(mode=0o600)
    assert (tmp_path / "new/secret").stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o666


def test_an_exception_between_the_two_renames_keeps_what_was_there(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text("old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder, contents=["manifest.json"]) as staging:
        (staging / "manifest.json").write_text("new")
    assert (folder / "manifest.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no manifest.json"):
        read_manifest(str(tmp_path))
    shard = {"split": "train", "file": "train/00000.parquet"}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [shard], "splits": {}, "config": {}}))
    with pytest.raises(UserError, match="lacks .*00000.parquet"):
        read_manifest(str(tmp_path))
