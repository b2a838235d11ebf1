"""A sweep's trials as plots. Each function draws on the axes that it is given; knows no files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tune.finals import Finalist
from tune.population import value_of
from tune.records import TrialRecord

_STOPPED = {"alpha": 0.35, "linewidth": 0.8}
_SHOWN_STATES = ("finished", "stopped")

Cost = Callable[[TrialRecord], float]


def with_loss(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those that have been evaluated, and have not failed."""
    return [trial for trial in trials if trial.loss is not None and trial.state in _SHOWN_STATES]


def draw_curves(axes: Any, trials: Sequence[TrialRecord], *, name: Callable[[TrialRecord], str]) -> None:
    """Held-out loss by step; trials that were stopped are pale, and the best is named."""
    shown = with_loss(trials)
    colors = _colors(shown)
    for trial in shown:
        points = [(row["step"], row["eval_loss"]) for row in trial.evaluations]
        style = {"linewidth": 1.4} if trial.state == "finished" else _STOPPED
        axes.plot(*zip(*points, strict=True), color=colors[trial.number], marker=".", markersize=3, **style)
    for trial in shown[:1]:
        row = trial.evaluations[-1]
        axes.annotate(name(trial), (row["step"], row["eval_loss"]), textcoords="offset points", xytext=(-4, -12),
                      ha="right", fontsize=7)  # fmt: skip
    axes.set(xlabel="step", ylabel="held-out loss (nats per token)", title="Loss of every trial")
    _without_outliers(axes, [row["eval_loss"] for trial in shown for row in trial.evaluations])


def draw_front(
    axes: Any,
    trials: Sequence[TrialRecord],
    *,
    cost: Cost,
    label: str,
    title: str,
    finalists: Sequence[Finalist] = (),
) -> None:
    """Final loss against a cost; the Pareto front is marked: no other is both cheaper and better.

    Finalists stand at their means, with a bar of one standard deviation to each side.
    """
    means = {finalist.trial.number: finalist.mean for finalist in finalists}

    def loss(trial: TrialRecord) -> Any:
        return means.get(trial.number, trial.loss)

    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    shown = with_loss(trials)
    colors = _colors(shown)
    for trial in shown:
        is_whole = trial.state == "finished"
        color = colors[trial.number]
        axes.scatter(cost(trial), loss(trial), s=22, color=color if is_whole else "none", edgecolors=color, zorder=3)
    for finalist in finalists:
        place = (cost(finalist.trial), finalist.mean)
        axes.errorbar(*place, yerr=finalist.deviation, color=colors[finalist.trial.number], capsize=3, linewidth=1.2)
    front = pareto_front(shown, cost=cost, loss=loss)
    axes.plot([cost(trial) for trial in front], [loss(trial) for trial in front], color="0.2", linewidth=1,
              drawstyle="steps-post", label="Pareto front")  # fmt: skip
    if len({cost(trial) for trial in shown}) > 1 and min(map(cost, shown)) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=label, ylabel="held-out loss", title=title)
    bars = [finalist.mean + side * finalist.deviation for finalist in finalists for side in (-1, 1)]
    _without_outliers(axes, [*map(loss, shown), *bars])
    if front:
        axes.legend(fontsize=7)


def pareto_front(
    trials: Sequence[TrialRecord], *, cost: Cost, loss: Callable[[TrialRecord], Any] = lambda trial: trial.loss
) -> list[TrialRecord]:
    """By rising cost, those than which no other is both cheaper and better."""
    front: list[TrialRecord] = []
    for trial in sorted(with_loss(trials), key=lambda trial: (cost(trial), loss(trial))):
        if not front or loss(trial) < loss(front[-1]):
            front.append(trial)
    return front


def draw_parallel(axes: Any, trials: Sequence[TrialRecord], keys: Sequence[str]) -> None:
    """A line a trial through what it tried, to the loss that it came to; the darker the better."""
    from matplotlib import colormaps

    shown = with_loss(trials)
    columns = {key: [_shown(trial.values.get(key)) for trial in shown] for key in keys}
    scales = [_scale(values) for values in columns.values()] + [_scale([trial.loss for trial in shown])]
    losses = np.array([trial.loss for trial in shown], dtype=float)
    ranks = np.argsort(np.argsort(losses))
    color = colormaps["viridis"]
    for number in reversed(np.argsort(ranks)):
        trial = shown[number]
        heights = [place(values[number]) for (place, _), values in zip(scales, columns.values(), strict=False)]
        quality = ranks[number] / max(1, len(shown) - 1)
        axes.plot([*heights, scales[-1][0](trial.loss)], color=color(quality), alpha=0.9 - 0.6 * quality, linewidth=1.2)
    for place, (_, ticks) in enumerate(scales):
        axes.axvline(place, color="0.8", linewidth=0.8, zorder=0)
        for height, text in ticks:
            axes.annotate(text, (place, height), fontsize=6, ha="center", va="center",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})  # fmt: skip
    axes.set_xticks(range(len(scales)), [*(key.rpartition(".")[2] for key in keys), "loss"], fontsize=7)
    axes.set(yticks=[], title="What each trial tried, and what it came to (dark: better)")
    axes.spines["left"].set_visible(False)


def draw_schedules(axes: Any, trials: Sequence[TrialRecord], *, key: str) -> None:
    """What `key` was at each step of what has become a trial; the best is thick."""
    shown = with_loss(trials)
    colors = _colors(shown)
    of_all: list[float] = []
    for place, trial in reversed(list(enumerate(shown))):
        steps = [0, *(change.after for change in trial.config.changes), trial.step]
        values = [value_of(trial.config, key, after=step) for step in steps]
        style = {"linewidth": 2.2, "zorder": 3} if not place else {"linewidth": 0.9, "alpha": 0.6}
        axes.plot(steps, values, drawstyle="steps-post", color=colors[trial.number], **style)
        of_all += values
    if min(of_all) > 0 and max(of_all) / min(of_all) > 5:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=key.rpartition(".")[2], title=f"{key.rpartition('.')[2]} (thick: the best)")


def draw_importance(axes: Any, importance: Mapping[str, float]) -> None:
    """Shares of the differences in loss that each key accounts for."""
    names = sorted(importance, key=lambda key: importance[key])
    axes.barh([name.rpartition(".")[2] for name in names], [importance[name] for name in names], color="tab:blue")
    axes.set(xlabel="share of the loss's variance", title="Which key matters")


def _colors(trials: Sequence[TrialRecord]) -> dict[int, Any]:
    """By technique, where there are several; else by size."""
    from matplotlib import colormaps

    techniques = sorted({trial.method for trial in trials})
    if len(techniques) > 1:
        return {trial.number: colormaps["tab10"](techniques.index(trial.method) % 10) for trial in trials}
    sizes = sorted({trial.trained_parameters for trial in trials})
    return {
        trial.number: colormaps["viridis"](0.9 * sizes.index(trial.trained_parameters) / max(1, len(sizes) - 1))
        for trial in trials
    }


def _without_outliers(axes: Any, losses: Sequence[Any]) -> None:
    """Those that diverge must not flatten all others to a line, however many they are: they are counted instead."""
    if losses:
        low, high = min(losses), _end_of_the_best(sorted(losses))
        margin = 0.08 * max(high - low, 1e-3)
        axes.set_ylim(low - margin, high + 4 * margin)
        above = sum(loss > high + 4 * margin for loss in losses)
        if above:
            text = f"{above} points are higher" if above > 1 else "1 point is higher"
            axes.annotate(text, (0.5, 0.97), xycoords="axes fraction", ha="center", va="top", fontsize=7)


def _end_of_the_best(losses: Sequence[float]) -> float:
    """Where `losses`, sorted, fall into two far groups: the largest of the better one; else the lowest nine tenths."""
    gaps = np.diff(losses)
    if len(gaps):
        last = int(np.argmax(gaps))
        if last >= 2 and gaps[last] > 2 * (losses[last] - losses[0]):
            return losses[last]
    return float(np.quantile(losses, 0.9))


def _shown(value: Any) -> Any:
    """Numbers as they are, anything else as text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _scale(values: Sequence[Any]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """Where a value stands between 0 and 1, and what is written there."""
    if all(isinstance(value, int | float) for value in values):
        is_log = min(values) > 0 and max(values) / min(values) > 20
        transform = np.log if is_log else np.asarray
        low, high = float(transform(min(values))), float(transform(max(values)))

        def place(value: float) -> float:
            return (float(transform(value)) - low) / (high - low) if high > low else 0.5

        known = sorted(set(values))
        marked = known if len(known) <= 8 else [known[0], known[len(known) // 2], known[-1]]
        return place, [(place(value), f"{value:.3g}") for value in marked]
    texts = sorted({str(value) for value in values})

    def place_of_text(value: Any) -> float:
        return texts.index(str(value)) / (len(texts) - 1) if len(texts) > 1 else 0.5

    return place_of_text, [(place_of_text(text), text.strip("[]").replace("'", "")) for text in texts]
