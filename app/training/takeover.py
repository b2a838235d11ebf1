"""A run that begins where another stands: with its weights, its optimizer's moments and its place in the data.

Its folder is then that of a run which was interrupted there, so it goes on as any other does. Knows no Ray.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from app.atomic import write_text
from app.config.schema import TrainConfig
from app.training.checkpointing import Checkpoint
from app.training.fine_tuning import Job, about_step, inputs_of, plan_job
from app.training.loop import Metrics
from app.training.run_log import RunLog, begin_folder


def begin_from(job: Job, checkpoint: Checkpoint, *, rows: Sequence[Metrics]) -> None:
    """Make the folder of `job`'s run from `checkpoint` and the `rows` that the other run has told until there.

    The two must differ in nothing but what `changes` changes after that step: what the folder's configuration says is
    what made it. Replaces what a takeover that was cut short left there.
    """
    output, inputs = Path(job.config.output), inputs_of(job)
    shutil.rmtree(output, ignore_errors=True)
    begin_folder(job.config, inputs=inputs)
    told = [row for row in rows if row["step"] <= checkpoint.step]
    write_text(output / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in told))
    state = {**checkpoint.state, **about_step(job, checkpoint.step, inputs=inputs)}
    own = Checkpoint(checkpoint.step, checkpoint.weights, checkpoint.moments, state)
    job.checkpoints.save(own, keep_last=job.config.keep_last, keep_best=job.config.keep_best)


def hand_over(source: TrainConfig, target: TrainConfig) -> None:
    """Begin the run of `target` from the newest checkpoint of `source`'s, which nobody trains meanwhile."""
    before = plan_job(source)
    checkpoint = before.checkpoints.latest()
    assert checkpoint is not None  # a run that waits for an exchange has just been saved
    begin_from(plan_job(target), checkpoint, rows=RunLog(Path(source.output), start_step=checkpoint.step).rows)
