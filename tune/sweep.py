"""`pacos sweep`: many training runs on the cluster, and which of them is best.

OUTPUT/sweep.json        the resolved settings
OUTPUT/trials/0007/      a trial (`records.py`)
OUTPUT/results.parquet, report.html, best.json, test.json, mlflow.json

As a job: `ray job submit --working-dir . -- python -m tune.sweep --config configs/sweeps/lora_rank.yaml`.
"""

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app.atomic import make_folder, write_text
from app.config.sweep import AshaConfig, MedianConfig, PopulationConfig, SweepConfig
from app.errors import Interrupted, UserError
from app.run_lock import locked
from app.tracking.run import open_tracker, tracked_run
from app.training.interruption import interruptible
from app.training.recording import log_warning
from app.training.run_log import check_is_new
from tune.finals import begin_finals, choose_finalists
from tune.held_back import evaluate_winner
from tune.plan import alone_of, base_of, most_trials, packed_of
from tune.records import TrialRecord, end_record, read_records
from tune.results import Results, ranked, write_results
from tune.room import check_nodes, share_out
from tune.search import open_search
from tune.space import Checked, with_secrets

SWEEP_FILE = "sweep.json"
_MAY_CHANGE = {"budget", "finals", "pack", "pack_size", "pass_tokens", "max_retries", "tracking", "register_as"}
"""Settings that a resumed sweep may change: how long it goes on and how it is computed, not what it compares."""
_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files of what our folders hold
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of state that we do without
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may end without any evaluation
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they stand in the trials' folders
}


def sweep(
    config: SweepConfig,
    checked: Checked,
    *,
    resume: bool = False,
    on_end: Callable[[TrialRecord], None] = lambda record: None,
    watched: Callable[[Callable[[], list[TrialRecord]]], Any] | None = None,
    warn: Callable[[str], None] = log_warning,
) -> Results:
    """Run the sweep; Ray is initialised. `on_end` is told of each trial that is over; `watched` makes a context, for
    the time of the sweep, of what reads the trials' records.

    Raises:
        UserError: the output folder holds something and `resume` is false, or another sweep; or MLflow does not answer;
            or no node holds a worker.
        Interrupted: a signal came; `resume` goes on.
    """
    from contextlib import nullcontext

    from tune.driver import Watch
    from tune.metrics import told_to_prometheus

    output = Path(config.output)
    check_nodes(_nodes(), checked.trials)
    tracker = open_tracker(config.tracking, output=config.output)
    with locked(output):
        open_folder(config, resume=resume)
        settings = config.model_dump(mode="json")
        watch = Watch(output)
        with (
            tracked_run(
                tracker, name=output.name, output=output, settings=settings, resume=resume, warn=warn
            ) as tracked,
            watched(watch.records) if watched else nullcontext(),
            told_to_prometheus(output.name, watch.records),
        ):
            parent = tracked.run_id if tracked is not None else None
            uri = "none" if tracker is None else tracker.uri
            spent = _run_trials(config, checked, watch=watch, tracking_uri=uri, parent=parent, on_end=on_end)
            for record in read_records(output):
                if record.state == "running" and record.repeats is None:  # the budget was spent
                    end_record(record.folder, state="stopped")
            results = write_results(config, read_records(output), ended_by=spent)
            if results.best is not None and _is_decided(config, results):
                if evaluate_winner(output, results.best) != results.test:
                    results = write_results(config, results.trials, ended_by=spent)
            elif results.best is not None:
                warn(
                    f"{spent} was spent before the finals were over: the best is the search's, and the test split has "
                    "not been used; raise the budget, and --resume goes on"
                )
            if tracked is not None:
                tracked.log(results.figures, step=0)
                tracked.keep(*(output / name for name in (SWEEP_FILE, *results.files)))
    return results


def open_folder(config: SweepConfig, *, resume: bool) -> None:
    """Begin the sweep's folder, or check that it holds this sweep.

    Raises:
        UserError: it holds something and `resume` is false; or true, and it holds nothing, or another sweep.
    """
    output, resolved = Path(config.output), config.model_dump(mode="json")
    stored = output / SWEEP_FILE
    if not resume:
        check_is_new(output)
    elif not stored.exists():
        raise UserError(f"output={config.output!r} holds no sweep to resume; leave --resume out to start one")
    else:
        before = SweepConfig.model_validate(json.loads(stored.read_text())).model_dump(mode="json")
        for key in sorted(resolved.keys() - _MAY_CHANGE):
            if before[key] != resolved[key]:
                raise UserError(f"{key}: the sweep was started with {before[key]!r}, not {resolved[key]!r}; keep it")
        if isinstance(config.scheduler, PopulationConfig) and config.budget.trials != before["budget"]["trials"]:
            raise UserError(
                f"budget.trials: the population was started with {before['budget']['trials']}, not "
                f"{config.budget.trials}; it can neither grow nor shrink, keep it"
            )
    make_folder(output)
    write_text(stored, json.dumps(resolved, indent=2) + "\n")


def _is_decided(config: SweepConfig, results: Results) -> bool:
    """Whether no run is missing that might change the winner."""
    if not config.finals.trials:
        return True
    return bool(results.repeats) and all(run.state != "running" for run in results.repeats)


def _run_trials(
    config: SweepConfig,
    checked: Checked,
    *,
    watch: Any,
    tracking_uri: str,
    parent: str | None,
    on_end: Callable[[TrialRecord], None],
) -> str | None:
    """The search, then the finals; returns which budget ended them, None where they ended of themselves."""
    for name, value in _TUNE_SETTINGS.items():  # before Ray Tune is imported
        os.environ.setdefault(name, value)
    import ray

    from tune.driver import Budget, TrialSource, release_all
    from tune.exchanges import start_exchanges
    from tune.pack_actor import Turnstile

    output, most = Path(config.output), most_trials(config)
    places, packs, keys = _start_packs(config, checked, parent=parent)
    turnstile = ray.remote(Turnstile).options(num_cpus=0).remote(places)
    secrets = functools.partial(with_secrets, tracking_uri=tracking_uri, checkpoints=config.train.get("checkpoints"))
    exchanges = None
    try:
        with interruptible() as is_interrupted:
            budget = Budget(config.budget, watch, is_interrupted)
            source = functools.partial(TrialSource, config, packs=packs, pack_keys=keys, turnstile=turnstile)
            shared = {"packs": packs, "turnstile": turnstile, "with_secrets": secrets, "parent": parent}
            fit = functools.partial(_fit, config, budget=budget, on_end=on_end)
            at_once = config.pack_size * len(packs) + places
            searched = [record for record in read_records(output) if record.repeats is None]
            if most is None or sum(record.state != "running" for record in searched) < most:
                every, room = None, at_once
                if isinstance(config.scheduler, PopulationConfig):
                    assert most is not None  # else the settings would have been refused
                    _check_room(config, packs, size=most)
                    every, room = config.scheduler.every, most  # they wait for each other
                    gone = [record.number for record in searched if record.state != "running"]
                    exchanges = start_exchanges(
                        config,
                        size=most,
                        total_steps=checked.most_steps,
                        gone=gone,
                        packs=packs,
                        with_secrets=secrets,
                    )
                fit(
                    "search",
                    source(open_search(config, begun=len(searched)), searched, exchanges=exchanges),
                    {**shared, "exchanges": exchanges, "exchange_every": every},
                    scheduler=_scheduler(config, checked),
                    at_once=room,
                )
            if config.finals.trials and not budget.stop_all():
                records = read_records(output)
                ranking = ranked([record for record in records if record.repeats is None])
                begin_finals(config, records, choose_finalists(ranking, config.finals.trials))
                records = read_records(output)
                if waiting := [r for r in records if r.repeats is not None and r.state == "running"]:
                    fit("finals", source(None, waiting), shared, scheduler=None, at_once=at_once)
    finally:
        release_all(packs, read_records(output))
        for actor in filter(None, (turnstile, exchanges)):
            ray.kill(actor)
    if is_interrupted():
        raise Interrupted("stopped; --resume goes on, without running what is finished again")
    return budget.spent()


def _fit(
    config: SweepConfig,
    stage: str,
    source: Any,
    shared: Mapping[str, Any],
    *,
    scheduler: Any,
    at_once: int,
    budget: Any,
    on_end: Callable[[TrialRecord], None],
) -> None:
    """The trials of `source` through Ray Tune, `at_once` side by side, each told what is `shared`; without a scheduler
    they run to their ends."""
    from ray import tune

    from tune.driver import Ends
    from tune.trial import run_trial

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    trainable = tune.with_parameters(run_trial, **shared)
    tuner = tune.Tuner(
        # Almost no CPU: those are for packs and for the workers of runs.
        tune.with_resources(trainable, {"CPU": 0.01}),
        tune_config=tune.TuneConfig(
            search_alg=source, scheduler=scheduler, num_samples=-1, max_concurrent_trials=at_once
        ),
        run_config=tune.RunConfig(
            name=f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(Path(config.output) / "ray"),
            failure_config=tune.FailureConfig(max_failures=config.max_retries),
            stop=budget,
            callbacks=[Ends(source, on_end)],
            verbose=0,
        ),
    )
    tuner.fit()


def _start_packs(config: SweepConfig, checked: Checked, *, parent: str | None) -> tuple[int, list[Any], list[str]]:
    """How many runs of their own have room at once; the packs, and which base each holds."""
    from tune.pack_actor import start_pack

    nodes = _nodes()
    packed = {base_of(trial): trial for trial in packed_of(config, checked)}
    most = most_trials(config)
    most_packs = None if most is None else -(-most // config.pack_size)
    counts, places = share_out(nodes, packed=packed, alone=alone_of(config, checked), most_packs=most_packs)
    keys = [key for key, count in counts.items() for _ in range(count)]
    start = functools.partial(start_pack, size=config.pack_size, pass_tokens=config.pass_tokens, parent=parent)
    return places, [start(packed[key]) for key in keys], keys


def _nodes() -> list[dict[str, float]]:
    """What each node has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _check_room(config: SweepConfig, packs: list[Any], *, size: int) -> None:
    """
    Raises:
        UserError: a population that is to be packed finds no place for all of it.
    """
    if packs and config.pack_size * len(packs) < size:
        raise UserError(
            f"a population of {size} trials is in packs all at once, and the cluster has room for {len(packs)} of "
            f"pack_size={config.pack_size}; raise pack_size"
        )


def _scheduler(config: SweepConfig, checked: Checked) -> Any:
    """None: every trial runs to its end."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

    by = {"time_attr": "step", "metric": "eval_loss", "mode": "min"}
    scheduler = config.scheduler
    if isinstance(scheduler, AshaConfig):
        return AsyncHyperBandScheduler(
            max_t=checked.most_steps,
            grace_period=min(scheduler.first_steps, checked.most_steps),
            reduction_factor=scheduler.factor,
            **by,
        )
    if isinstance(scheduler, MedianConfig):
        return MedianStoppingRule(
            grace_period=scheduler.first_steps,
            min_samples_required=scheduler.trials,
            min_time_slice=float("inf"),  # else trials that wait for others to compare with are ended and begun again
            hard_stop=True,
            **by,
        )
    return None


if __name__ == "__main__":
    from app.cli import main

    main("sweep")
