"""The finals of a sweep, and the test split; no Ray."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from past_trials import end_with, past_trial

import tune.held_back
from app.config import EvaluateConfig, SweepConfig
from app.errors import UserError
from tune.driver import TrialSource
from tune.finals import begin_finals, choose_finalists, finalists_of
from tune.held_back import evaluate_winner
from tune.records import TrialRecord, read_records
from tune.report import ranking_table
from tune.results import Results, importance_of, ranked, read_best, write_results

SweepOf = Callable[..., SweepConfig]


def records_of(sweep: SweepConfig) -> list[TrialRecord]:
    return read_records(Path(sweep.output))


def begin(sweep: SweepConfig) -> list[TrialRecord]:
    """The finals of what has been searched; returns their runs that are not over."""
    records = records_of(sweep)
    ranking = ranked([record for record in records if record.repeats is None])
    begin_finals(sweep, records, choose_finalists(ranking, sweep.finals.trials))
    return [record for record in records_of(sweep) if record.repeats is not None and record.state == "running"]


@pytest.fixture
def searched(sweep_of: SweepOf) -> SweepConfig:
    """Trial 0 was lucky: the best in the search."""
    sweep = sweep_of(space={"method.rank": [1, 2, 3, 4]}, finals={"trials": 2, "seeds": 3}, train={"seed": 5})
    for number, loss in enumerate([5.0, 5.1, 5.4, 4.0]):
        state = "stopped" if loss == 4.0 else "finished"
        past_trial(sweep, number, {"method.rank": number + 1}, [6.0, loss], state=state, weights=100 * (number + 1))
    return sweep


@pytest.fixture
def decided(searched: SweepConfig) -> SweepConfig:
    for run, loss in zip(begin(searched), [5.5, 5.3, 5.4, 5.2, 5.15, 5.1], strict=True):
        end_with(run.folder, [6.0, loss])
    return searched


def test_each_finalist_is_trained_again_with_the_seeds_after_its_own(searched: SweepConfig) -> None:
    runs = begin(searched)
    assert [(run.number, run.repeats, run.config.seed) for run in runs] == [
        (4, 0, 6), (5, 0, 7), (6, 0, 8), (7, 1, 6), (8, 1, 7), (9, 1, 8),
    ]  # fmt: skip
    assert runs[3].values == {"method.rank": 2, "seed": 6} and runs[3].config.method.rank == 2
    assert runs[3].trained_parameters == 200
    assert runs[3].config.output.endswith("trials/0007/run")


def test_of_several_techniques_first_the_best_of_each_is_a_finalist(sweep_of: SweepOf) -> None:
    sweep = sweep_of()
    tried = [("lora", 5.0), ("lora", 5.1), ("bitfit", 5.6), ("prompt", 5.3), ("adapter", 5.2)]
    for number, (technique, loss) in enumerate(tried):
        values = {"method.type": technique, "optimizer.learning_rate": 1e-3 * (number + 1)}
        past_trial(sweep, number, values, [6.0, loss], state="failed" if technique == "prompt" else "finished")
    past_trial(sweep, 5, {"method.type": "lora", "optimizer.learning_rate": 1e-3, "seed": 9}, [6.0, 5.01])
    ranking = ranked(records_of(sweep))
    # Trial 5 differs from trial 0 in its seed alone.
    assert [trial.number for trial in choose_finalists(ranking, 9)] == [0, 4, 2, 1]
    assert [trial.number for trial in choose_finalists(ranking, 2)] == [0, 4]
    assert choose_finalists(ranking, 0) == []


def test_finalists_are_ranked_by_the_mean_over_other_seeds(decided: SweepConfig) -> None:
    results = Results(records_of(decided))
    assert [trial.number for trial in results.ranking] == [1, 0, 2, 3]
    winner = results.finalists[0]
    assert winner.mean == pytest.approx(5.15) and winner.deviation == pytest.approx(statistics.stdev([5.2, 5.15, 5.1]))
    assert results.best is not None
    assert (results.best.number, results.best.loss) == (8, 5.15)  # the median run, not the luckiest
    assert results.count("finished") == 9 and results.tokens == 200
    header, rows = ranking_table(results)
    assert header[-1] == "over seeds" and "seed" not in header
    assert rows[0][-1] == "5.1500 ± 0.0500 (3)" and rows[2][-1] == ""


def test_no_finalist_before_all_runs_of_the_finals_are_over_and_none_of_which_one_failed(searched: SweepConfig) -> None:
    *runs, last = begin(searched)
    for run in runs[1:]:
        end_with(run.folder, [6.0, 5.5])
    end_with(runs[0].folder, [6.0], state="failed", error="diverged")
    results = Results(records_of(searched))
    assert results.finalists == [] and results.best is not None and results.best.number == 0
    end_with(last.folder, [6.0, 5.5])
    assert [finalist.trial.number for finalist in finalists_of(records_of(searched))] == [1]


def test_finals_go_on_where_a_killed_driver_left_them(searched: SweepConfig) -> None:
    first = begin(searched)
    end_with(first[0].folder, [6.0, 5.5])
    waiting = begin(searched)
    assert [run.number for run in waiting] == [run.number for run in first[1:]]
    places = {"packs": [], "pack_keys": [], "turnstile": None}
    source = TrialSource(searched.model_copy(update={"pack": "never"}), None, waiting, **places)
    suggested = [source.suggest(str(place)) for place in range(6)]
    assert [Path(each["folder"]).name for each in suggested[:5]] == ["0005", "0006", "0007", "0008", "0009"]
    assert suggested[5] == TrialSource.FINISHED
    more = searched.model_copy(update={"finals": searched.finals.model_copy(update={"seeds": 4})})
    assert [(run.repeats, run.config.seed) for run in begin(more)[5:]] == [(0, 9), (1, 9)]


def test_the_winner_and_the_spread_stand_in_the_table_the_page_and_best_json(decided: SweepConfig) -> None:
    output = Path(decided.output)
    results = write_results(decided, records_of(decided), ended_by=None)
    best = json.loads((output / "best.json").read_text())
    assert (best["trial"], best["repeats"], best["seeds"]) == (8, 1, 3)
    assert best["mean_eval_loss"] == pytest.approx(5.15) and "seed=7" in best["command"]
    assert read_best(output) == output / "trials/0008/run"
    table = pq.read_table(output / "results.parquet").to_pylist()
    assert [(row["rank"], row["trial"], row["repeats"]) for row in table[:5]] == [
        (1, 1, None), (1, 7, 1), (1, 8, 1), (1, 9, 1), (2, 0, None),
    ]  # fmt: skip
    assert table[0]["std_eval_loss"] == pytest.approx(0.05) and table[1]["std_eval_loss"] is None
    page = (output / "report.html").read_text()
    assert "5.1500 ± 0.0500 (3)" in page and "its median run</span><b>trial 8" in page
    assert results.figures["best_mean_eval_loss"] == pytest.approx(5.15)
    assert importance_of(decided, results.ranking) == {}  # four trials of the search tell too little


def test_the_test_split_is_used_once_for_the_winner(decided: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EvaluateConfig] = []

    def evaluate(config: EvaluateConfig) -> list[Any]:
        asked.append(config)
        return [SimpleNamespace(records=12, tokens=99, loss=5.2, perplexity=181.3, bits_per_byte=2.5)]

    monkeypatch.setattr(tune.held_back, "plan_evaluation", lambda config: config)
    monkeypatch.setattr(tune.held_back, "evaluate", evaluate)
    output, results = Path(decided.output), Results(records_of(decided))
    assert results.best is not None
    figures = evaluate_winner(output, results.best)
    assert figures is not None and (figures.trial, figures.loss) == (8, 5.2)
    assert (asked[0].split, asked[0].answers, asked[0].precision) == ("test", 0, "fp32")
    assert asked[0].delta == str(output / "trials/0008/run/delta")
    other = next(trial for trial in results.trials if trial.number == 4)
    assert evaluate_winner(output, other) == figures  # also for another winner, after a resume
    assert len(asked) == 1
    results = write_results(decided, results.trials, ended_by=None)
    assert results.test == figures and "test.json" in results.files
    assert json.loads((output / "best.json").read_text())["test"]["loss"] == 5.2
    page = (output / "report.html").read_text()
    assert "loss on the test split" in page and "5.2000 (trial 8)" in page


def test_what_could_never_come_to_finals_is_refused(sweep_of: SweepOf) -> None:
    settings: dict[str, Any] = {"search": {"type": "tpe"}, "budget": {"hours": 1}}
    sweep_of(**settings)
    with pytest.raises(UserError, match=r"finals\.trials=3: .*set budget\.trials, or finals\.trials=0"):
        sweep_of(**settings, finals={})
    with pytest.raises(UserError, match=r"finals\.seeds=1"):
        sweep_of(finals={"seeds": 1})
