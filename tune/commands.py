"""What `pacos sweep` and `pacos promote --best` do: connect to Ray, call the sweep, show how it goes."""

import json
from pathlib import Path

from app import console
from app.commands import on_ray
from app.config import PromoteBestConfig, PromoteConfig, SweepConfig, WorkersConfig
from app.display.sweep import show_end, show_results, watched_trials
from app.display.training import show_promoted
from app.errors import check_not_masked

Address = str | None


def sweep(config: SweepConfig, *, address: Address, resume: bool) -> None:
    from tune.plan import needed_resources, plan_sweep
    from tune.report import ranking_table, shown
    from tune.results import command_of
    from tune.sweep import sweep as run

    with console.console.status("checking the space"):
        checked = plan_sweep(config)  # mistakes are told before Ray starts
    cpus, gpus = needed_resources(config, checked)
    with on_ray(address, workers=WorkersConfig(count=1, cpus=cpus, gpus=gpus)):
        results = run(
            config,
            checked,
            resume=resume,
            on_end=lambda trial: show_end(trial, {key: shown(value) for key, value in trial.values_now.items()}),
            watched=watched_trials,
            warn=lambda text: console.say(text, style="yellow"),
        )
    best = results.best
    show_results(config.output, results, *ranking_table(results), command=command_of(best.config) if best else None)


def promote_best(config: PromoteBestConfig) -> None:
    from app.tracking.registry import promote, register_finished
    from app.tracking.store import tracking_uri
    from tune.results import read_best
    from tune.sweep import SWEEP_FILE

    folder = Path(config.best)
    run = read_best(folder)
    of_sweep = SweepConfig.model_validate(json.loads((folder / SWEEP_FILE).read_text()))
    name = config.name or of_sweep.register_as or folder.name
    store = config.tracking or of_sweep.tracking
    check_not_masked("tracking.uri", store.uri)
    uri = tracking_uri(store.uri, output=of_sweep.output)
    version = register_finished(run, name, uri=uri)
    chosen = PromoteConfig.model_validate(
        {"name": name, "version": version, "alias": config.alias, "tracking": {"uri": uri}}
    )
    show_promoted(chosen, promote(chosen))
