"""What `pacos sweep` and `pacos promote --best` do: connect to Ray, call the sweep, show how it goes."""

import json
from pathlib import Path

from app import console
from app.commands import on_ray
from app.config import PromoteBestConfig, PromoteConfig, SweepConfig, WorkersConfig
from app.config.tracking import RegisteredName
from app.display.sweep import show_end, show_results, watched_trials
from app.display.training import show_promoted
from app.errors import UserError, check_not_masked

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
    name = config.name or of_sweep.register_as or _name_of(folder)
    store = config.tracking or of_sweep.tracking
    check_not_masked("tracking.uri", store.uri)
    uri = tracking_uri(store.uri, output=of_sweep.output)
    version = register_finished(run, name, uri=uri)
    chosen = PromoteConfig.model_validate(
        {"name": name, "version": version, "alias": config.alias, "tracking": {"uri": uri}}
    )
    show_promoted(chosen, promote(chosen))


def _name_of(sweep: Path) -> str:
    """
    Raises:
        UserError: the folder is called what no registered model may be.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(RegisteredName).validate_python(sweep.name)
    except ValidationError:
        raise UserError(
            f"best={str(sweep)!r}: the folder's name {sweep.name!r} is none for a registered model, which begins with "
            "a letter or digit and has letters, digits, spaces, dots, dashes and underscores; give one with name=NAME"
        ) from None
