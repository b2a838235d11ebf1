from pathlib import Path

import pytest

from app.config import AskConfig, EvaluateConfig, IndexConfig, PretrainConfig, ServeConfig, TrainConfig, load_config
from app.errors import UserError

REQUIRED = ["data=d", "output=o"]


def explain(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, overrides=[*REQUIRED, *overrides])
    return str(caught.value)


def test_overrides_stand_above_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: from-file\noutput: o\nmethod: {type: lora, rank: 4}\nseed: 3\n")
    config = load_config(TrainConfig, file=str(file), overrides=["data=from-override", "method.rank=16"])
    assert (config.data, config.method.rank, config.seed) == (str(Path("from-override").absolute()), 16, 3)


def test_a_nested_override_keeps_the_other_defaults_of_that_job() -> None:
    config = load_config(PretrainConfig, overrides=["sources=[a.txt]", "output=o", "optimizer.learning_rate=2e-3"])
    assert config.optimizer.learning_rate == 2e-3
    assert config.optimizer.weight_decay == PretrainConfig(sources=("a.txt",), output="o").optimizer.weight_decay == 0.1


def test_choosing_another_variant_drops_the_defaults_of_the_first() -> None:
    assert load_config(TrainConfig, overrides=[*REQUIRED, "method.type=full"]).method.type == "full"


def test_configs_are_frozen() -> None:
    config = load_config(TrainConfig, overrides=REQUIRED)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("metod.rank=3", ["metod", "unknown key", "'method'"]),
        ("method.rnk=3", ["method.rnk=3", "unknown key", "'rank'"]),
        ("workers.coun=3", ["workers.coun=3", "'count'"]),
        ("method.rank=abc", ["method.rank='abc'", "integer"]),
        ("method.rank=0", ["method.rank=0", "greater than 0"]),
        ("method.type=lor", ["method.type='lor'", "'lora'"]),
        ("method=5", ["method=5", "rank"]),
        ("batch_size=1", ["batch_size=1", "leaves some of workers.count=2 without a row"]),
        ("workers.count=[1,32]", ["batch_size=16", "leaves some of workers.count=32 without a row"]),
        ("workers.count=[3,2]", ["workers.count=[3, 2]", "a pair [least, most]"]),
        ("workers.count=[1,2,3]", ["workers.count=[1, 2, 3]", "a pair [least, most]"]),
        ("workers.count=0", ["workers.count=0", "from 1"]),
        ("precision=fp8", ["precision='fp8'", "'bf16'"]),
        ("seed", ["'seed'", "key=value"]),
        ("data=${nothing}", ["nothing"]),
        ("data=s3://bucket/x", ["data='s3://bucket/x'", "object stores"]),
        ("data=", ["data=''", "names no path"]),
    ],
)
def test_a_mistake_is_told_with_key_value_and_remedy(override: str, parts: list[str]) -> None:
    message = explain(override)
    assert all(part in message for part in parts), message


def test_workers_are_a_number_or_for_training_a_pair() -> None:
    workers = load_config(TrainConfig, overrides=[*REQUIRED, "workers.count=[1,4]"]).workers
    assert (workers.count, workers.least, workers.most, workers.is_elastic) == ((1, 4), 1, 4, True)
    fixed = load_config(TrainConfig, overrides=[*REQUIRED, "workers.count=3"]).workers
    assert (fixed.count, fixed.least, fixed.most, fixed.is_elastic) == (3, 3, 3, False)
    for job in (EvaluateConfig, PretrainConfig, IndexConfig):
        with pytest.raises(UserError, match=r"workers.count=\[1, 4\]: this job takes one number of workers; a pair"):
            load_config(job, overrides=["workers.count=[1,4]"])


@pytest.mark.parametrize(
    ("given", "read"),
    [("s3://bucket/run", "s3://bucket/run"), ("file:///tmp/x", "/tmp/x"), ("here", str(Path("here").absolute()))],
)
def test_checkpoints_go_to_a_folder_or_a_store(given: str, read: str) -> None:
    assert load_config(TrainConfig, overrides=[*REQUIRED, f"checkpoints={given}"]).checkpoints == read


def test_text_is_taken_as_it_stands() -> None:
    for text in ("Translate to French: good morning", "yes", "2024", "a=b"):
        assert load_config(AskConfig, overrides=[f"question={text}"]).question == text


def test_numbers_may_be_written_with_an_exponent() -> None:
    config = load_config(TrainConfig, overrides=[*REQUIRED, "optimizer.learning_rate=1e-3"])
    assert config.optimizer.learning_rate == 0.001


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(UserError, match="data: required.*data=VALUE"):
        load_config(TrainConfig, overrides=["output=o"])


def test_an_unknown_key_inside_a_variant_names_that_variants_keys() -> None:
    with pytest.raises(UserError, match="cache.backend.urll=3: unknown key; did you mean 'url'"):
        load_config(ServeConfig, overrides=["cache.backend.type=redis", "cache.backend.urll=3"])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a: [", "not valid YAML"),
        (b"- a\n", "key: value pairs"),
        (b"\xff\xfe\xfa", "cannot be read"),
        (b"data: 2024-01-01", "'date'"),
        (b"data: 'a${b'", "bad.yaml"),
    ],
)
def test_a_bad_file_is_told(tmp_path: Path, content: bytes, part: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=part):
        load_config(TrainConfig, file=str(file))


def test_a_missing_file_is_told() -> None:
    with pytest.raises(UserError, match="nowhere.yaml does not exist"):
        load_config(TrainConfig, file="nowhere.yaml")
