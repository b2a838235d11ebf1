"""What is kept of a run while it goes and at its end: metrics, plots, report, cost, and the MLflow run; and what
Prometheus sees of it.

Both jobs, fine-tuning and pretraining, record alike. Does not know what they train.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.atomic import write_text
from app.config.schema import PretrainConfig, TrainConfig
from app.run_lock import locked
from app.tracking.registry import figures_of_summary, register
from app.tracking.run import TrackedRun, Warn, flattened, open_tracker, tracked_run
from app.training.checkpoint_store import CheckpointStore
from app.training.cost import WorkerHours
from app.training.loop import Metrics
from app.training.report import Report, write_report
from app.training.run_log import RunLog, open_run
from app.training.samples import read_samples

if TYPE_CHECKING:
    from app.training.metrics import RunMetrics

OnMetrics = Callable[[Metrics], None]


def log_warning(text: str) -> None:
    """Where nobody else takes a run's warnings."""
    logging.getLogger("pacos").warning(text)


@contextmanager
def recorded(
    config: TrainConfig | PretrainConfig,
    *,
    inputs: str,
    checkpoints: CheckpointStore,
    resume: bool,
    title: str,
    on_metrics: OnMetrics,
    warn: Warn,
    parent: str | None = None,
) -> Iterator["Recording"]:
    """Lock and open the run's folder, and its MLflow run, for the block; `inputs` is a hash of what the run reads.

    `parent` is the id of the MLflow run that this one belongs to, as a trial to its sweep.

    Raises:
        UserError: another run holds the folder, its state does not fit `resume`, or MLflow does not answer.
    """
    from app.training.metrics import RunMetrics

    output = Path(config.output)
    with locked(output):
        tracker = open_tracker(config.tracking, output=config.output)  # first: it may fail, and no folder is begun
        start_step = open_run(config, inputs=inputs, checkpoints=checkpoints, resume=resume)
        log = RunLog(output, start_step=start_step)
        recovered = log.recover(checkpoints.unwritten_rows()) if start_step else []
        workers = config.workers
        hours = WorkerHours(output, workers=workers.least, price_per_hour=workers.price_per_hour, resume=resume)
        name = config.tracking.run_name or output.name
        settings = config.model_dump(mode="json")
        try:
            with (
                tracked_run(
                    tracker, name=name, output=output, settings=settings, resume=resume, warn=warn, parent=parent
                ) as run,
                RunMetrics(name) as told,
            ):
                if run is not None:
                    for metrics in log.rows if run.is_new else recovered:  # new: it goes on, but was not here before
                        _track(run, metrics)
                yield Recording(title, output, settings, log, hours, run, told, on_metrics)
        finally:
            hours.end()


def _track(run: TrackedRun, metrics: Metrics) -> None:
    run.log({key: value for key, value in metrics.items() if key != "step"}, step=metrics["step"])


@dataclass
class Recording:
    title: str
    output: Path
    settings: dict[str, Any]
    log: RunLog
    hours: WorkerHours
    run: TrackedRun | None
    told: "RunMetrics"
    on_metrics: OnMetrics

    def add(self, metrics: Metrics) -> None:
        """Take what rank 0 reports; MLflow gets it from a thread of its own."""
        self.hours.count(metrics.get("workers"))
        self.log.add(metrics)
        self.told.add(metrics)
        if self.run is not None:
            _track(self.run, metrics)
        self.on_metrics(metrics)

    def finish(self, figures: dict[str, Any], *, delta: Path | None = None, register_as: str | None = None) -> dict:
        """Write result.json, loss.png and report.html, and give MLflow all there is; returns the whole summary.

        `delta` is the result's folder, which goes to MLflow, and under `register_as` into its registry.
        """
        self.hours.end()
        rows = self.log.rows
        tokens = int(sum(row.get("tokens", 0) for row in rows))
        summary = {**figures, "tokens": tokens, **self.hours.figures(tokens=tokens)}
        if self.run is not None:
            step = rows[-1]["step"] if rows else 0
            summary |= self._in_mlflow(self.run, summary, step=step, delta=delta, register_as=register_as)
        self.log.plot(self.output / "loss.png", title=self.title)
        write_text(self.output / "result.json", json.dumps(summary, indent=2) + "\n")
        write_report(
            Report(
                self.title,
                self.output,
                rows=rows,
                summary=summary,
                settings=flattened(self.settings),
                samples=read_samples(self.output),
            )
        )
        if self.run is not None:
            names = ("config.json", "result.json", "report.html", "loss.png", "samples.json", "metrics.jsonl")
            self.run.keep(*(self.output / name for name in names))
        self.told.end("finished")
        return summary

    def _in_mlflow(
        self, run: TrackedRun, summary: dict[str, Any], *, step: int, delta: Path | None, register_as: str | None
    ) -> dict[str, Any]:
        """The run's id, and where asked for the version that was registered; a store that fails costs a warning."""
        run.log(summary, step=step)
        kept = delta is not None and run.keep(delta)
        registered = None
        if delta is not None and register_as is not None and kept:
            figures = figures_of_summary(summary)
            registered = run.attempt(
                f"the delta could not be registered as {register_as!r}; `--resume` tries it again",
                lambda: register(run.client, run.run_id, register_as, delta_folder=delta, figures=figures),
            )
        return {"mlflow_run": run.run_id, "registered": registered}
