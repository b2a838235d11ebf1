"""What may be tried, and what is refused before anything starts; no Ray."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.config import SweepConfig, load_config
from app.errors import UserError
from tune.plan import alone_of, base_of, packed_of, plan_sweep
from tune.search import open_search
from tune.space import check_space, grid_of, trial_config

SweepOf = Callable[..., SweepConfig]
REPOSITORY = Path(__file__).parents[2]


def test_a_grid_has_every_combination_of_every_branch_and_no_key_of_another(sweep_of: SweepOf) -> None:
    config = sweep_of(
        space=[
            {"method.type": "lora", "method.rank": [1, 4], "optimizer.learning_rate": ["1e-3", 0.01]},
            {"method": {"type": "adapter", "size": [8]}},
        ]
    )
    search = open_search(config)
    found = [search.ask(number) for number in range(6)]
    assert [branch for branch, _ in filter(None, found)] == [0, 0, 0, 0, 1]
    assert found[5] is None
    assert found[0][1] == {"method.type": "lora", "method.rank": 1, "optimizer.learning_rate": 1e-3}
    assert found[4][1] == {"method.type": "adapter", "method.size": 8}
    trial = trial_config(config, found[4][1], number=4)
    assert trial.method.type == "adapter" and trial.method.size == 8
    assert trial.workers.count == 1 and trial.output.endswith("sweep/trials/0004/run")


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_draws_keep_to_their_ranges_and_come_again_from_the_same_seed(sweep_of: SweepOf, kind: str) -> None:
    config = sweep_of(
        space=[
            {
                "optimizer.learning_rate": {"log_uniform": ["1e-4", "1e-2"]},
                "optimizer.warmup_fraction": {"uniform": [0.1, 0.3]},
                "method.rank": {"log_int_uniform": [1, 16]},
                "method.targets": [["attn.qkv"], ["attn.qkv", "mlp.up"]],
            },
            {"method.type": "prefix", "method.length": {"int_uniform": [3, 6]}},
        ],
        search={"type": kind, "seed": 3},
        budget={"trials": 40},
    )
    first, second = open_search(config), open_search(config)
    draws = [first.ask(number) for number in range(40)]
    assert draws == [second.ask(number) for number in range(40)]
    assert {branch for branch, _ in draws} == {0, 1}
    loras = [values for branch, values in draws if branch == 0]
    assert all(1e-4 <= values["optimizer.learning_rate"] <= 1e-2 for values in loras)
    assert all(0.1 <= values["optimizer.warmup_fraction"] <= 0.3 for values in loras)
    assert all(values["method.rank"] in range(1, 17) for values in loras)
    assert {values["method.length"] for branch, values in draws if branch == 1} <= {3, 4, 5, 6}
    below = sum(values["optimizer.learning_rate"] < 1e-3 for values in loras)
    assert 0.2 < below / len(loras) < 0.8  # the middle of a logarithmic range is its geometric mean
    for _, values in draws:
        trial_config(config, values)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"space": {"method.rnk": [1, 2]}}, r"method\.rnk=1: unknown key; did you mean 'rank'"),
        ({"space": {"method.rank": []}}, r"method\.rank=\[\]: the list is empty"),
        ({"space": {}}, "no map of keys"),
        ({"space": []}, "a map of keys"),
        ({"space": {"method.rank": [4, 64]}}, r"method\.rank=64 must be below 32"),
        ({"space": {"method.rank": [1, 0]}}, r"method\.rank=0"),
        ({"space": [{"method.type": "lora"}, {"method.type": "adapter", "method.size": [8, 32]}]},
         r"space\.1: method\.size=32 must be below 32"),
        ({"space": {"method.targets": [["attn.q"]]}}, "matches no layer"),
        ({"space": {"method.type": ["lora", "loar"]}}, "loar"),
        ({"space": {"method.rank": {"uniform": [1, 2]}}}, "is a range, and a grid needs lists"),
        ({"space": {"optimizer.learning_rate": {"log_uniform": [0, 1]}}}, "a logarithm needs numbers above 0"),
        ({"space": {"optimizer.learning_rate": {"log_uniform": [1, 0.1]}}}, "must be below the second"),
        ({"space": {"method.rank": {"int_uniform": [1.5, 4]}}}, "must be whole numbers"),
        ({"space": {"optimizer": {"uniform": [1, 2], "of": 3}}}, "a range is one of"),
        ({"search": {"type": "tpe"}}, "has no end; set budget.trials"),
        ({"budget": {"trials": 1}}, "less than the grid's 2 combinations"),
        ({"budget": {"cost": 1}}, "needs a price"),
        ({"train": {"output": "x"}}, "train.output is the sweep's"),
        ({"train": {"batch_size": 10_000}}, "more than the"),
        ({"scheduler": {"type": "asha", "factor": 1}}, "factor"),
        ({"space": {"workers.threads": {"int_uniform": [1, 4]}}, "search": {"type": "random"}, "budget": {"trials": 2}},
         r"space: workers\.threads is a range, .*; give a list of values, or set pack=never"),
        ({"train": {"method": [{"type": "lora"}, {"type": "prefix"}]}, "space": {"method.rank": [1, 2]}},
         r"space: method\.rank is a part of train\.method, .*; say all of method in one of them"),
        ({"space": {"method.rank": [1, 2], "method": [[{"type": "lora"}, {"type": "prefix"}], [{"type": "lora"}]]}},
         r"space: method\.rank is a part of method, and one of them would replace the other"),
        ({"space": {"optimizer": [{"schedule": "linear"}]}}, r"train\.optimizer\.learning_rate is a part of optimizer"),
    ],
)  # fmt: skip
def test_what_could_not_run_is_refused_with_key_and_value(
    sweep_of: SweepOf, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        plan_sweep(sweep_of(**settings))


def test_data_without_held_out_records_compares_nothing(sweep_of: SweepOf, tiny_shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "all-for-training"
    shutil.copytree(tiny_shards, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["validation"] = dict.fromkeys(manifest["splits"]["validation"], 0)
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["split"] != "validation"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no held-out records.*larger validation_fraction"):
        plan_sweep(sweep_of(train={"data": str(copy)}))


def test_each_value_is_checked_also_where_combinations_are_many(sweep_of: SweepOf) -> None:
    many = {"seed": list(range(40)), "optimizer.learning_rate": [1e-4 * n for n in range(1, 41)]}
    with pytest.raises(UserError, match="method.rank=32"):
        check_space(sweep_of(space={**many, "method.rank": [1, 2, 32]}))
    assert check_space(sweep_of(space={**many, "method.rank": [1, 2]})).most_steps == 8


def test_what_a_sweep_has_ready_is_of_all_combinations_also_where_they_are_many(
    sweep_of: SweepOf, tiny_model: Path, tmp_path: Path
) -> None:
    many = {"seed": list(range(40)), "optimizer.learning_rate": [1e-4 * n for n in range(1, 41)]}
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    bases = {"model": [str(tiny_model), str(copy)], "precision": ["fp32", "bf16"], "workers.threads": [1, 2]}
    sweep = sweep_of(space={**many, **bases})
    assert len({base_of(trial) for trial in packed_of(sweep, check_space(sweep))}) == 8

    sweep = sweep_of(space={**many, "method.type": ["bitfit", "lora"], "samples": [3, 0]})
    checked = check_space(sweep)
    assert len(packed_of(sweep, checked)) == 1 and len(alone_of(sweep, checked)) == 3

    longest = check_space(sweep_of(space={"epochs": 2, "batch_size": 4}, train={"max_steps": None}))
    checked = check_space(sweep_of(space={**many, "epochs": [1, 2], "batch_size": [8, 4]}, train={"max_steps": None}))
    assert checked.most_steps == longest.most_steps > checked.least_steps


def test_workers_may_be_a_range_where_no_pack_starts_for_them(sweep_of: SweepOf) -> None:
    given: dict[str, Any] = {"space": {"workers.threads": {"int_uniform": [1, 4]}}, "search": {"type": "random"}}
    for settings in ({"pack": "never"}, {"train": {"method": {"type": "bitfit"}}}):
        plan_sweep(sweep_of(**given, **settings, budget={"trials": 2}))


def test_an_override_reaches_a_dotted_key_of_the_file(tmp_path: Path) -> None:
    file = str(REPOSITORY / "configs/sweeps/lora_rank.yaml")
    config = load_config(SweepConfig, file=file, overrides=["space.method.rank=[2,4]", "train.max_steps=7"])
    assert config.space[0]["method.rank"].values == (2, 4)
    assert config.train["max_steps"] == 7


def test_what_is_written_down_reads_as_the_same_sweep(sweep_of: SweepOf) -> None:
    space = [{"method.rank": [1, 2], "optimizer.learning_rate": {"log_uniform": ["1e-4", 1e-2]}}]
    config = sweep_of(space=space, search={"type": "random"}, budget={"trials": 3})
    assert SweepConfig.model_validate_json(config.model_dump_json()) == config
    assert len(list(grid_of(config.space[0]))) == 4
