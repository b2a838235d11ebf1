"""What is made of trials that are over: search, ranking, table, report; no Ray."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from past_trials import past_trial

from app.config import PromoteBestConfig, SweepConfig, TrainConfig, load_config
from app.errors import UserError
from tune.commands import promote_best
from tune.plan import plan_sweep
from tune.plots import _end_of_the_best, pareto_front
from tune.records import ERROR_FILE, TrialRecord, end_record, note_error, read_record, read_records
from tune.results import command_of, importance_of, ranked, read_best, write_results
from tune.search import open_search
from tune.space import trial_config, with_secrets
from tune.sweep import open_folder

SweepOf = Callable[..., SweepConfig]


@pytest.fixture
def past(sweep_of: SweepOf) -> tuple[SweepConfig, list[TrialRecord]]:
    sweep = sweep_of(space={"method.rank": [1, 2, 4], "optimizer.learning_rate": {"log_uniform": [1e-4, 1e-1]}},
                     search={"type": "tpe", "random_trials": 4}, budget={"trials": 20})  # fmt: skip
    for number in range(8):
        values = {"method.rank": (1, 2, 4)[number % 3], "optimizer.learning_rate": 1e-4 * 2**number}
        past_trial(sweep, number, values, [6.0, 5.5, 5.0 + 0.1 * abs(number - 5)], weights=100 * (1 + number % 3))
    past_trial(sweep, 8, {"method.rank": 1, "optimizer.learning_rate": 2e-4}, [6.0, 4.0], state="stopped")
    past_trial(sweep, 9, {"method.rank": 1, "optimizer.learning_rate": 9e-2}, [], state="failed", error="lost | worker")
    return sweep, read_records(Path(sweep.output))


def test_records_are_read_as_they_were_written_also_while_a_line_is_being_written(past) -> None:
    sweep, trials = past
    assert [trial.number for trial in trials] == list(range(10))
    assert trials[3].values == {"method.rank": 1, "optimizer.learning_rate": 8e-4}
    assert (trials[3].state, trials[3].step, trials[3].tokens, trials[3].seconds) == ("finished", 4, 30, 1.5)
    assert trials[3].loss == pytest.approx(5.2) and trials[3].cost is None
    end_record(trials[3].folder, state="failed")
    assert read_record(trials[3].folder).state == "finished"  # the first word counts


def test_an_error_is_a_line_and_below_it_the_whole_traceback_without_passwords(sweep_of: SweepOf) -> None:
    def reach_the_bucket() -> None:
        raise OSError("cannot reach\ns3://key:hunter2@bucket/ranks: no route")

    trial = past_trial(sweep_of(), 0, {"method.rank": 1}, [6.0], state="running")
    try:
        try:
            reach_the_bucket()
        except OSError as error:
            raise RuntimeError("the trial was lost") from error
    except RuntimeError as error:
        note_error(trial.folder, error)
    end_record(trial.folder, state="failed")
    told = "OSError: s3://key:***@bucket/ranks: no route"
    assert read_record(trial.folder).error == told
    noted = (trial.folder / ERROR_FILE).read_text()
    assert noted.startswith(f"{told}\n") and "hunter2" not in noted
    assert "in reach_the_bucket" in noted and noted.endswith("RuntimeError: the trial was lost\n")


def test_those_that_finished_come_first_and_the_front_has_no_trial_that_another_beats(past) -> None:
    _, trials = past
    order = [trial.number for trial in ranked(trials)]
    assert order[:3] == [5, 4, 6] and order[-2:] == [8, 9]
    front = pareto_front(trials, cost=lambda trial: trial.trained_parameters)
    assert [trial.number for trial in front] == [8]
    whole = [trial for trial in trials if trial.state == "finished"]
    front = pareto_front(whole, cost=lambda trial: trial.trained_parameters)
    assert [(trial.trained_parameters, trial.number) for trial in front] == [(100, 6), (300, 5)]


def test_plots_end_above_the_better_trials_where_the_others_diverged(past) -> None:
    assert _end_of_the_best([3.17, 3.18, 3.2, 6.9, 7.1, 7.5, 7.6]) == 3.2
    assert _end_of_the_best([3.1, 3.2, 3.3, 3.4, 3.5, 3.6]) == pytest.approx(3.55)  # no gap: nearly all
    assert _end_of_the_best([3.1, 7.0]) > 6 and _end_of_the_best([3.1]) == 3.1


def test_results_are_a_table_a_winner_and_a_page(past) -> None:
    sweep, trials = past
    results = write_results(sweep, trials, ended_by="budget.hours=1")
    output = Path(sweep.output)
    assert results.best is not None and results.best.number == 5
    table = pq.read_table(output / "results.parquet").to_pylist()
    assert [row["trial"] for row in table][:2] == [5, 4]
    assert (
        table[0]["optimizer.learning_rate"] == pytest.approx(3.2e-3)
        and table[-1]["error"] == "RuntimeError: lost | worker"
    )
    assert read_best(output) == Path(results.best.config.output)
    page = (output / "report.html").read_text()
    assert page.count("<img") == 5 and "budget.hours=1" in page and "lost | worker" in page
    assert command_of(results.best.config).replace("'", "&#x27;") in page
    assert (output / "sweep.png").stat().st_size > 10_000


def test_the_learning_rate_that_made_the_losses_is_called_important(past) -> None:
    sweep, trials = past
    importance = importance_of(sweep, trials)
    assert set(importance) == {"method.rank", "optimizer.learning_rate"}
    assert importance["optimizer.learning_rate"] > importance["method.rank"]
    assert sum(importance.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "values",
    [
        {"method.type": "lora", "method.targets": ["attn.qkv"], "optimizer.learning_rate": 3e-5},
        {"method.type": "freeze", "method.frozen": ["embeddings"], "seed": 3},
        {"method": [{"type": "lora", "rank": 2}, {"type": "prefix", "length": 3}]},
    ],
)
def test_the_command_computes_what_the_trial_computed(sweep_of: SweepOf, values: dict[str, Any]) -> None:
    trial = trial_config(sweep_of(), values)
    program, command, *overrides = shlex.split(command_of(trial, output="/elsewhere"))
    assert (program, command) == ("pacos", "train")
    again = load_config(TrainConfig, overrides=overrides)
    assert again.model_copy(update={"output": trial.output, "tracking": trial.tracking}) == trial


def test_the_estimator_knows_the_trials_of_an_earlier_session(past) -> None:
    sweep, trials = past
    search = open_search(sweep)
    for trial in trials:
        search.tell(trial)
    states = [trial.state.name for trial in search.study.trials]
    assert states == ["COMPLETE"] * 8 + ["PRUNED", "FAIL"]
    best = search.study.best_trial
    assert best.value == pytest.approx(5.0)
    assert best.params["0/optimizer.learning_rate"] == pytest.approx(3.2e-3)
    assert best.params["0/method.rank"] == 2  # the place of rank 4
    assert search.study.trials[8].intermediate_values == {2: 4.0}


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_a_resumed_search_does_not_try_the_same_again(sweep_of: SweepOf, kind: str) -> None:
    space = {"method.rank": [1, 2, 4], "optimizer.learning_rate": {"log_uniform": [1e-4, 1e-1]}}
    sweep = sweep_of(space=space, search={"type": kind}, budget={"trials": 20})
    tried: list[dict[str, Any]] = []
    for session in range(3):
        begun = len(tried)
        search = open_search(sweep, begun=begun)
        for trial in read_records(Path(sweep.output)):
            search.tell(trial)
        for number in range(begun, begun + 2):  # all of them still drawn at random
            suggestion = search.ask(number)
            assert suggestion is not None
            tried.append(suggestion[1])
            past_trial(sweep, number, suggestion[1], [6.0, 5.0 - session])
    assert len({values["optimizer.learning_rate"] for values in tried}) == 6
    assert open_search(sweep).ask(0) == (0, tried[0])


def test_a_folder_without_a_winner_says_so(sweep_of: SweepOf, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of a sweep"):
        read_best(tmp_path)
    sweep = sweep_of()
    past_trial(sweep, 0, {"method.rank": 1}, [6.0, 5.0], state="stopped")
    results = write_results(sweep, read_records(Path(sweep.output)), ended_by=None)
    assert results.best is None
    with pytest.raises(UserError, match="none of its trials has finished"):
        read_best(Path(sweep.output))


def test_only_the_same_sweep_is_resumed(sweep_of: SweepOf, tmp_path: Path) -> None:
    first = sweep_of(space={"method.rank": [1, 2, 3]})
    with pytest.raises(UserError, match="holds no sweep to resume"):
        open_folder(first, resume=True)
    (tmp_path / "file.json").write_text(first.model_dump_json())
    open_folder(load_config(SweepConfig, file=str(tmp_path / "file.json")), resume=False)
    with pytest.raises(UserError, match="is not empty"):
        open_folder(first, resume=False)
    with pytest.raises(UserError, match="space: the sweep was started with"):
        open_folder(sweep_of(space={"method.rank": [1, 2]}), resume=True)
    open_folder(first.model_copy(update={"pack_size": 3}), resume=True)


SECRET = "s3://key:hunter2@bucket/ranks?region=eu"


def test_a_password_of_the_checkpoints_place_is_written_nowhere_and_trials_have_it_yet(sweep_of: SweepOf) -> None:
    sweep = sweep_of(train={"checkpoints": SECRET})
    open_folder(sweep, resume=False)
    past_trial(sweep, 3, {"method.rank": 1}, [6.0, 5.0], state="stopped")
    files = [path for path in Path(sweep.output).rglob("*") if path.is_file()]
    assert len(files) > 3 and not any(b"hunter2" in path.read_bytes() for path in files)
    record = read_record(Path(sweep.output) / "trials/0003")
    assert record.config.checkpoints == "s3://key:***@bucket/ranks/0003/run?region=eu"
    config = with_secrets(record.config, tracking_uri="none", checkpoints=sweep.train["checkpoints"])
    assert config.checkpoints == "s3://key:hunter2@bucket/ranks/0003/run?region=eu"
    assert config == trial_config(sweep, {"method.rank": 1}, number=3).model_copy(update={"tracking": config.tracking})


def test_the_command_names_no_place_that_the_trial_keeps_its_checkpoints_in(sweep_of: SweepOf) -> None:
    trial = trial_config(sweep_of(train={"checkpoints": SECRET, "keep_last": 3}), {"method.rank": 2}, number=3)
    command = command_of(trial)
    assert "keep_last=3" in command and "checkpoints" not in command and "bucket" not in command


def test_a_resumed_sweep_wants_the_password_again_from_the_command_or_the_environment(
    sweep_of: SweepOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(train={"checkpoints": SECRET})
    open_folder(sweep, resume=False)
    stored = str(Path(sweep.output) / "sweep.json")
    with pytest.raises(UserError, match=r"train\.checkpoints='s3://key:\*\*\*@bucket.* whole URI again"):
        plan_sweep(load_config(SweepConfig, file=stored))
    open_folder(load_config(SweepConfig, file=stored, overrides=[f"train.checkpoints={SECRET}"]), resume=True)
    monkeypatch.setenv("PLACE", SECRET)
    given = load_config(SweepConfig, file=stored, overrides=["train.checkpoints=${oc.env:PLACE}"])
    assert given.train["checkpoints"] == SECRET
    open_folder(given, resume=True)
    with pytest.raises(UserError, match="train: the sweep was started with"):
        open_folder(sweep_of(train={"checkpoints": "s3://key:hunter2@elsewhere/ranks"}), resume=True)
    assert sweep_of(train={"checkpoints": "here"}).train["checkpoints"] == str(Path("here").absolute())


def test_a_promotion_wants_the_tracking_password_again(sweep_of: SweepOf) -> None:
    sweep = sweep_of(tracking={"uri": "postgresql://me:hunter2@db/mlflow", "artifacts": "s3://bucket"})
    open_folder(sweep, resume=False)
    past_trial(sweep, 0, {"method.rank": 1}, [6.0, 5.0])
    write_results(sweep, read_records(Path(sweep.output)), ended_by=None)
    with pytest.raises(
        UserError, match=r"tracking\.uri='postgresql://me:\*\*\*@db/mlflow' .* give the whole URI again"
    ):
        promote_best(PromoteBestConfig(best=sweep.output))


def test_a_promotion_wants_a_name_where_the_folders_is_none_for_a_model(sweep_of: SweepOf, tmp_path: Path) -> None:
    sweep = sweep_of(output=str(tmp_path / "rank+rate"))
    open_folder(sweep, resume=False)
    past_trial(sweep, 0, {"method.rank": 1}, [6.0, 5.0])
    write_results(sweep, read_records(Path(sweep.output)), ended_by=None)
    with pytest.raises(UserError, match=r"the folder's name 'rank\+rate' is none .*; give one with name=NAME"):
        promote_best(PromoteBestConfig(best=sweep.output))
    with pytest.raises(UserError, match="was not tracked"):  # the next that is wrong
        promote_best(PromoteBestConfig(best=sweep.output, name="rank"))
