"""What a sweep has found: its ranking, results.parquet, best.json, sweep.png and the report. Knows no Ray."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from app.atomic import replaced_file, write_text
from app.config.schema import TrainConfig
from app.config.sweep import PopulationConfig, SweepConfig
from app.errors import UserError
from tune.finals import Finalist, finalists_of
from tune.held_back import TEST_FILE, TestFigures, read_test
from tune.records import TrialRecord, read_records
from tune.space import flattened_values

TABLE, BEST, PLOT, REPORT = "results.parquet", "best.json", "sweep.png", "report.html"


@dataclass(frozen=True)
class Results:
    trials: Sequence[TrialRecord]
    """All, those of the finals among them."""
    ended_by: str | None = None
    """The budget that was spent."""
    test: TestFigures | None = None

    @cached_property
    def finalists(self) -> list[Finalist]:
        """The best mean first; none before the finals are over."""
        return finalists_of(self.trials)

    @cached_property
    def ranking(self) -> list[TrialRecord]:
        """Those of the search: the finalists, by their means; others that finished; that were stopped; that failed."""
        first = [finalist.trial for finalist in self.finalists]
        numbers = {trial.number for trial in first}
        searched = [trial for trial in self.trials if trial.repeats is None and trial.number not in numbers]
        return [*first, *ranked(searched)]

    @property
    def repeats(self) -> list[TrialRecord]:
        """Those of the finals."""
        return [trial for trial in self.trials if trial.repeats is not None]

    @property
    def best(self) -> TrialRecord | None:
        """The run to take: of the finalist of the lowest mean that with the median loss; without finals the finished
        trial of the lowest loss."""
        if self.finalists:
            return self.finalists[0].run
        return next((trial for trial in self.ranking if trial.state == "finished" and trial.loss is not None), None)

    def finalist(self, trial: TrialRecord) -> Finalist | None:
        return next((finalist for finalist in self.finalists if finalist.trial.number == trial.number), None)

    @property
    def tokens(self) -> int:
        return sum(trial.tokens for trial in self.trials)

    @property
    def cost(self) -> float | None:
        costs = [trial.cost for trial in self.trials if trial.cost is not None]
        return sum(costs) if costs else None

    def count(self, state: str) -> int:
        return sum(trial.state == state for trial in self.trials)

    @property
    def figures(self) -> dict[str, float]:
        """For MLflow."""
        counts = {f"trials_{state}": self.count(state) for state in ("finished", "stopped", "failed")}
        best = {} if self.best is None or self.best.loss is None else {"best_eval_loss": self.best.loss}
        test = {} if self.test is None else {"test_loss": self.test.loss}
        return {**counts, **best, **self._spread(), **test, "tokens": self.tokens}

    def _spread(self) -> dict[str, float]:
        return _spread(self.finalists[0], prefix="best_") if self.finalists else {}

    @property
    def files(self) -> tuple[str, ...]:
        return (TABLE, BEST, PLOT, REPORT, *([TEST_FILE] if self.test is not None else []))


def ranked(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    order = {"finished": 0, "running": 1, "stopped": 1, "failed": 2}

    def key(trial: TrialRecord) -> tuple[int, float, int]:
        return order[trial.state], float("inf") if trial.loss is None else trial.loss, trial.number

    return sorted(trials, key=key)


def write_results(config: SweepConfig, trials: Sequence[TrialRecord], *, ended_by: str | None) -> Results:
    """Everything but the trials' own folders."""
    from tune.report import write_plot, write_report

    output = Path(config.output)
    results = Results(trials, ended_by, read_test(output))
    _write_table(output / TABLE, results)
    if results.best is not None:
        write_text(output / BEST, json.dumps(_about_best(results, results.best), indent=2) + "\n")
    # In a population a loss comes from values that changed on the way.
    importance = {} if isinstance(config.scheduler, PopulationConfig) else importance_of(config, results.ranking)
    write_plot(output / PLOT, config, results, importance=importance)
    write_report(output / REPORT, config, results, importance=importance)
    return results


def _about_best(results: Results, best: TrialRecord) -> dict[str, Any]:
    about = {
        "trial": best.number,
        "run": best.config.output,
        "eval_loss": best.loss,
        "values": dict(best.values),
        "command": command_of(best.config),
    }
    if results.finalists:
        about |= {"repeats": best.repeats, **_spread(results.finalists[0])}
    if results.test is not None:
        about["test"] = asdict(results.test)
    return about


def _spread(finalist: Finalist, *, prefix: str = "") -> dict[str, float]:
    return {
        f"{prefix}mean_eval_loss": finalist.mean,
        f"{prefix}std_eval_loss": finalist.deviation,
        f"{prefix}seeds": len(finalist.runs),
    }


def read_best(sweep: Path) -> Path:
    """The run folder of the winner.

    Raises:
        UserError: `sweep` is no sweep's folder, or none of its trials has finished.
    """
    file = sweep / BEST
    if not file.is_file():
        what = "none of its trials has finished" if read_records(sweep) else "it is no folder of a sweep"
        raise UserError(f"best={str(sweep)!r} has no {BEST}: {what}")
    return Path(json.loads(file.read_text())["run"])


def command_of(config: TrainConfig, *, output: str = "runs/best") -> str:
    """The `pacos train` that computes the same: what differs from the defaults."""
    defaults = TrainConfig(data=config.data, output=config.output)
    now, before = flattened_values(config.model_dump(mode="json")), flattened_values(defaults.model_dump(mode="json"))
    differing = {key: value for key, value in now.items() if before.get(key, ...) != value}
    hidden = ("output", "data", "tracking.", "checkpoints")
    settings = {key: value for key, value in differing.items() if not key.startswith(hidden)}
    # A technique is named first: what its keys mean depends on it.
    ordered = sorted(settings, key=lambda key: key != "method.type")
    parts = [f"data={config.data}", f"output={output}", *(f"{key}={_written(settings[key])}" for key in ordered)]
    return " ".join(["pacos train", *map(shlex.quote, parts)])


def importance_of(config: SweepConfig, trials: Sequence[TrialRecord]) -> dict[str, float]:
    """For each key that every trial has, its share in the variance of the loss (fANOVA, Hutter et al. 2014); empty
    where too few trials tell."""
    import optuna

    shown = [trial for trial in trials if trial.loss is not None and trial.state in ("finished", "stopped")]
    keys = [key for key in varying_keys(trials) if all(key in trial.values for trial in shown)]
    if len(shown) < 6 or not keys:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    codes = {key: _codes([trial.values[key] for trial in shown]) for key in keys}
    distributions = {key: distribution for key, (_, distribution) in codes.items()}
    for place, trial in enumerate(shown):
        params = {key: values[place] for key, (values, _) in codes.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=trial.loss))
    if len({trial.loss for trial in shown}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def varying_keys(trials: Sequence[TrialRecord]) -> list[str]:
    """Keys that differ between trials, in the order of the space."""
    keys = dict.fromkeys(key for trial in trials for key in trial.values)
    return [key for key in keys if len({json.dumps(trial.values.get(key), default=str) for trial in trials}) > 1]


def _codes(values: Sequence[Any]) -> tuple[list[Any], Any]:
    """Values as one distribution of Optuna's takes them, and that distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = float(min(values)), float(max(values))
        return [float(value) for value in values], FloatDistribution(low, high, log=low > 0 and high / low > 20)
    texts = [json.dumps(value, default=str) for value in values]
    return texts, CategoricalDistribution(sorted(set(texts)))


def _write_table(file: Path, results: Results) -> None:
    """A row for each trial; those of the finals stand behind the one that they repeat, at its rank."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = list(dict.fromkeys(key for trial in results.trials for key in trial.values))
    has_takeovers = any(trial.lineage for trial in results.trials)
    rows = [
        {
            "rank": place,
            "trial": trial.number,
            "repeats": trial.repeats,
            "state": trial.state,
            "method": trial.method,
            "eval_loss": trial.loss,
            "step": trial.step,
            "tokens": trial.tokens,
            "seconds": trial.seconds,
            "cost": trial.cost,
            "trained_parameters": trial.trained_parameters,
            **{key: _cell(trial.values.get(key)) for key in keys},
            **(_takeovers(trial) if has_takeovers else {}),
            "seed": trial.config.seed,
            "error": trial.error,
            "folder": trial.config.output,
            **({} if (finalist := results.finalist(trial)) is None else _spread(finalist)),
        }
        for place, of_search in enumerate(results.ranking, start=1)
        for trial in (of_search, *(run for run in results.repeats if run.repeats == of_search.number))
    ]
    for key in keys:  # a column has one type
        if len({type(row[key]) for row in rows if row[key] is not None}) > 1:
            for row in rows:
                row[key] = None if row[key] is None else str(row[key])
    with replaced_file(file) as staging:
        pq.write_table(pa.Table.from_pylist(rows), staging)


def _takeovers(trial: TrialRecord) -> dict[str, str | None]:
    """What changed on its way, and what it took over, as JSON."""
    if not trial.config.changes:
        return {"changes": None, "lineage": None}
    changes = [change.model_dump(mode="json") for change in trial.config.changes]
    return {"changes": json.dumps(changes), "lineage": json.dumps(trial.lineage)}


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str) else json.dumps(value)


def _written(value: Any) -> str:
    """As YAML, and so a command's override, reads it."""
    if isinstance(value, str):
        return value
    return json.dumps(value)
