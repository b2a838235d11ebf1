"""OUTPUT/report.html and sweep.png: a sweep on one page. Self-contained, but for links to its trials' own reports."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app import pages
from app.atomic import replaced_file, write_text
from app.config.sweep import PopulationConfig, SweepConfig
from tune.finals import Finalist
from tune.plots import draw_curves, draw_front, draw_importance, draw_parallel, draw_schedules, with_loss
from tune.population import Exchange, read_exchanges
from tune.records import TrialRecord
from tune.results import Results, command_of, varying_keys
from tune.space import flattened_values


def write_report(file: Path, config: SweepConfig, results: Results, *, importance: Mapping[str, float]) -> None:
    best = results.best
    parts = [pages.tiles(_tiles(results))]
    if with_loss(results.ranking):
        parts.append(pages.figures(*_draws(config, results, importance)))
        keys = varying_keys(results.ranking)
        if keys and not isinstance(config.scheduler, PopulationConfig):
            parts.append(pages.wide_figure(functools.partial(draw_parallel, trials=results.ranking, keys=keys)))
    parts += [pages.heading("Ranking", note=_note(results)), pages.ranking(*ranking_table(results))]
    if exchanges := read_exchanges(file.parent):
        parts.append(pages.heading("Exchanges", note="A trial that took over another had its weights and optimizer."))
        parts.append(pages.table({f"after step {each.step}": exchange_text(each) for each in exchanges}))
    if best is not None:
        note = "The command that computes the same."
        if best.config.changes:
            note += " Its changes were found on the way, by exchanges; here they are settings of the run."
        parts.append(pages.heading("The best once more", note=note))
        parts.append(pages.columns({f"trial {best.number}": command_of(best.config)}))
    failed = {f"trial {trial.number}": trial.error for trial in results.trials if trial.state == "failed"}
    if failed:
        parts += [pages.heading("Failed"), pages.table(failed)]
    write_text(file, pages.page(f"Sweep {file.parent.name}", note=config.output, parts=parts))


def write_plot(file: Path, config: SweepConfig, results: Results, *, importance: Mapping[str, float]) -> None:
    """Four plots in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not with_loss(results.ranking):
        return
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    draws = _draws(config, results, importance)
    for place, draw in zip(axes.flat, draws, strict=False):
        draw(place)
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
    for place in list(axes.flat)[len(draws) :]:
        place.set_visible(False)
    figure.suptitle(file.parent.name)
    with replaced_file(file) as staging:
        figure.savefig(staging, dpi=120, format="png")
    pyplot.close(figure)


def ranking_table(results: Results) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: what varied, and what came of it; of finalists also the mean over other seeds."""
    keys = varying_keys(results.ranking)
    names = map(_short, keys)
    seeds = ("over seeds",) if results.finalists else ()
    changes = ("changes",) if any(trial.config.changes for trial in results.ranking) else ()
    header = ("", "trial", "state", *names, *changes, "weights", "step", "tokens", "loss", *seeds)
    rows = [_row(place, trial, keys, changes) for place, trial in enumerate(results.ranking, start=1)]
    if seeds:
        finalists = map(results.finalist, results.ranking)
        rows = [(*row, spread_of(finalist) if finalist else "") for row, finalist in zip(rows, finalists, strict=True)]
    return header, rows


def spread_of(finalist: Finalist) -> str:
    return f"{finalist.mean:.4f} ± {finalist.deviation:.4f} ({len(finalist.runs)})"


def changes_text(trial: TrialRecord) -> str:
    """What of its settings changed on the way, and when."""
    return "; ".join(
        f"after {values.pop('after')}: " + ", ".join(f"{_short(key)} {shown(value)}" for key, value in values.items())
        for values in (flattened_values(change.model_dump()) for change in trial.config.changes)
    )


def exchange_text(exchange: Exchange) -> str:
    return "\n".join(
        f"trial {each.weak} ({exchange.losses[each.weak]:.4f}) took over trial {each.strong} "
        f"({exchange.losses[each.strong]:.4f}): "
        + ", ".join(f"{_short(key)} {shown(each.before[key])} → {shown(value)}" for key, value in each.after.items())
        for each in exchange.takeovers
    )


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _row(place: int, trial: TrialRecord, keys: list[str], changes: tuple[str, ...]) -> tuple[str, ...]:
    return (
        str(place),
        str(trial.number),
        trial.state,
        *(shown(trial.values.get(key)) for key in keys),
        *([changes_text(trial)] if changes else []),
        f"{trial.trained_parameters:,}",
        f"{trial.step:,}",
        f"{trial.tokens:,}",
        "" if trial.loss is None else f"{trial.loss:.4f}",
    )


def shown(value: Any) -> str:
    """A setting, short."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _draws(config: SweepConfig, results: Results, importance: Mapping[str, float]) -> list[Callable[[Any], None]]:
    trials = results.ranking
    has_cost = all(trial.cost is not None for trial in with_loss(trials))
    draws: list[Callable[[Any], None]] = [
        functools.partial(draw_curves, trials=[*trials, *results.repeats], name=_short_name),
        functools.partial(
            draw_front,
            trials=trials,
            finalists=results.finalists,
            cost=_weights,
            label="trained weights",
            title="Loss and trained weights",
        ),
        functools.partial(
            draw_front,
            trials=trials,
            finalists=results.finalists,
            cost=_money if has_cost else _seconds,
            label="cost" if has_cost else "seconds of training (in a pack its share)",
            title="Loss and cost",
        ),
    ]
    if importance:
        draws.append(functools.partial(draw_importance, importance=importance))
    if isinstance(config.scheduler, PopulationConfig):
        draws += [functools.partial(draw_schedules, trials=trials, key=key) for key in config.scheduler.mutate]
    return draws


def _weights(trial: TrialRecord) -> float:
    return trial.trained_parameters


def _seconds(trial: TrialRecord) -> float:
    return trial.seconds


def _money(trial: TrialRecord) -> float:
    return trial.cost or 0.0


def _short_name(trial: TrialRecord) -> str:
    return f"trial {trial.number}: {trial.loss:.4f}"


def _tiles(results: Results) -> dict[str, str | None]:
    best, test = results.best, results.test
    found: dict[str, str | None]
    if results.finalists:
        winner = results.finalists[0]
        found = {
            "winner": f"trial {winner.trial.number}",
            "held-out loss over seeds": spread_of(winner),
            "its median run": f"trial {winner.run.number}",
        }
    else:
        found = {
            "best held-out loss": None if best is None or best.loss is None else f"{best.loss:.4f}",
            "of trial": None if best is None else str(best.number),
        }
    return {
        **found,
        "loss on the test split": None if test is None else f"{test.loss:.4f} (trial {test.trial})",
        "finished": str(results.count("finished")),
        "stopped early": str(results.count("stopped")),
        "failed": str(results.count("failed")),
        "tokens": f"{results.tokens:,}",
        "cost": None if results.cost is None else f"{results.cost:,.4g}",
    }


def _note(results: Results) -> str:
    ended = f" The sweep ended because {results.ended_by} was spent." if results.ended_by else ""
    finals = (
        " Finalists come before all, by the mean over runs with other seeds: ± one standard deviation, and how many."
        if results.finalists
        else ""
    )
    return f"By held-out loss at the last evaluation; those that made all their steps come first.{finals}{ended}"
