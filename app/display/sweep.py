"""A sweep in the terminal: its trials while they run, and what came of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from app import console

_STYLES = {"running": "", "finished": "green", "stopped": "dim", "failed": "red"}
_SHOWN_RUNNING = 20


@contextmanager
def watched_trials(trials: Callable[[], Sequence[Any]]) -> Iterator[None]:
    """A live table of the newest that run and of the best that are over, for the block; without a terminal there is
    none."""
    with console.live(lambda: _table(trials())):
        yield


def show_end(trial: Any, values: Mapping[str, str]) -> None:
    """A line for a trial that is over."""
    about = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())
    loss = "" if trial.loss is None else f"held-out loss {trial.loss:.4f} "
    reason = f": {trial.error}" if trial.error else ""
    console.say(
        f"trial {trial.number:>3}  {trial.state:8}  {loss}at step {trial.step:,}  ({about}){reason}",
        style=_STYLES[trial.state],
    )


def show_results(
    output: str, results: Any, header: Sequence[str], rows: Sequence[Sequence[str]], *, command: str | None
) -> None:
    counts = ", ".join(f"{results.count(state)} {state}" for state in ("finished", "stopped", "failed"))
    console.grid(
        f"{output}: {counts}", header, rows, right=(0, 1, *range(header.index("weights"), len(header))), last=False
    )
    if results.ended_by:
        console.say(f"The sweep ended because {results.ended_by} was spent.")
    if results.finalists:
        winner = results.finalists[0]
        console.say(
            f"Winner: trial {winner.trial.number}, held-out loss {winner.mean:.4f} ± {winner.deviation:.4f} over "
            f"{len(winner.runs)} other seeds; trial {winner.run.number} is the median of them."
        )
    if results.test is not None:
        test = results.test
        console.say(
            f"On the test split, trial {test.trial}: loss {test.loss:.4f}, perplexity {test.perplexity:.2f}, "
            f"{test.bits_per_byte:.4f} bits per byte, {test.records:,} records"
        )
    elif results.finalists:
        console.say(
            "The data has no test split for the winner; pacos prepare test_fraction=0.02 makes one.", style="dim"
        )
    if results.best is not None:
        console.say(f"The best once more: {command}")
        console.say(f"To production: pacos promote --best {output}")
    else:
        console.say("No trial has made all its steps, so there is none to promote.", style="yellow")
    console.say(f"Report: {output}/report.html")


def _table(trials: Sequence[Any]) -> Any:
    over = [trial for trial in trials if trial.state != "running"]
    running = [trial for trial in trials if trial.state == "running"]
    rated = sorted((trial for trial in over if trial.loss is not None), key=lambda trial: trial.loss)
    rows = [
        (
            str(trial.number),
            trial.state,
            ", ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in trial.values_now.items()),
            console.short_number(trial.tokens),
            f"{trial.step:,}",
            "" if trial.loss is None else f"{trial.loss:.4f}",
        )
        for trial in [*rated[:5], *running[-_SHOWN_RUNNING:]]
    ]
    return console.rich_grid(
        ("trial", "state", "", "tokens", "step", "held-out loss"),
        rows,
        right=(0, 3, 4, 5),
        title=f"{len(over)} over, {len(running)} running; {console.short_number(sum(t.tokens for t in trials))} tokens",
    )


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
