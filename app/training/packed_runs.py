"""Whole training runs in a pack: each with a folder, checkpoints, MLflow run and result, as `fine_tune` leaves them.

A thread of its own steps the pack. A run goes on to its next evaluation when it is asked for that (`go_on`), and waits
there: so whoever asks may decide first whether it is worth it. Knows no Ray.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from app.assets import model_folder
from app.config.schema import TrainConfig
from app.data.batches import Batch
from app.models.checkpoints import load_decoder
from app.training.fine_tuning import (
    Job,
    about_step,
    figures_of,
    inputs_of,
    loop_plan,
    plan_job,
    title_of,
    validation_batches,
    write_result,
)
from app.training.loop import Metrics
from app.training.pack import Member, Pack, why_not_packed
from app.training.recording import Recording, log_warning, recorded
from app.training.takeover import begin_from
from app.training.trainer import check_continues, checkpoint_of, peak_memory_bytes

TOGETHER_WITHIN_S = 1.0
"""How long runs that may go on wait for those that are being decided on, so that they stay in one pass."""


@dataclass(eq=False)
class _Run:
    job: Job
    inputs: str
    member: Member
    recording: Recording
    resources: ExitStack
    """Its lock and MLflow run."""
    allowed: int = -1
    """The step until which it may go; -1: it may not even begin."""
    is_over: bool = False
    """Whether its result is written."""
    writing: threading.Lock = field(default_factory=threading.Lock)
    """Held while its folder is written to, and when it leaves: who joins anew finds all, and gets nothing after."""
    error: Exception | None = None
    """What it failed of."""
    ready: deque[Metrics | Exception] = field(default_factory=deque)
    """What `go_on` returns next."""

    @property
    def next_stop(self) -> int:
        """The next step that is evaluated."""
        every, plan = self.member.plan.eval_every, self.member.plan
        return min((self.member.step // every + 1) * every, plan.total_steps)

    @property
    def may_step(self) -> bool:
        return self.member.has_begun and self.member.step < self.allowed

    @property
    def may_begin(self) -> bool:
        return not self.member.has_begun and self.allowed >= 0

    @property
    def is_due(self) -> bool:
        return self.may_begin or self.may_step


class PackedRuns:
    """Runs over the base of `config`, with its precision, threads and device, until the process ends."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        pass_tokens: int,
        parent: str | None = None,
        warn: Callable[[str], None] = log_warning,
    ) -> None:
        torch.set_num_threads(config.workers.threads)
        device = torch.device("cuda" if config.workers.gpus else "cpu")
        self.model = config.model
        self._pack = Pack(
            load_decoder(model_folder(config.model)), precision=config.precision, device=device, pass_tokens=pass_tokens
        )
        self._parent = parent
        self._warn = warn
        self._runs: dict[str, _Run] = {}
        self._held_out: dict[tuple[str, int], list[Batch]] = {}
        self._changed = threading.Condition()
        self._joining = threading.Lock()  # initial weights come from torch's one random stream
        self._finishing = ThreadPoolExecutor(1)
        threading.Thread(target=self._work, name="pack", daemon=True).start()

    def join(self, name: str, config: TrainConfig) -> Metrics | None:
        """A run that is new, or goes on from what its folder holds; returns what that told last.

        Raises:
            UserError: it cannot be trained here, or its folder or MLflow will not have it.
        """
        reason = why_not_packed(config)
        assert reason is None and config.model == self.model, reason
        job = plan_job(config)
        inputs = inputs_of(job)
        self.leave(name)  # of an earlier try
        resources = ExitStack()
        with resources:
            recording = resources.enter_context(
                recorded(
                    config,
                    inputs=inputs,
                    checkpoints=job.checkpoints,
                    resume=(Path(config.output) / "config.json").exists(),
                    title=title_of(job),
                    on_metrics=lambda metrics: None,
                    warn=self._warn,
                    parent=self._parent,
                )
            )
            checkpoint = job.checkpoints.latest()
            if checkpoint is not None:
                expected = about_step(job, checkpoint.step, inputs=inputs)
                check_continues(checkpoint, expected, place=job.checkpoints.place)
            with self._joining:
                member = self._pack.new_member(
                    name,
                    config.method,
                    plan=loop_plan(job, workers=1),
                    batches=job.feed.local_batches,
                    validation=self._validation(job),
                    resume=checkpoint,
                )
            kept = resources.pop_all()
        with self._changed:
            run = self._runs[name] = _Run(job, inputs, member, recording, kept)
        last = next(reversed(recording.log.rows), None)
        if member.is_done:  # its process was lost between the last step and the result
            assert last is not None
            self._finishing.submit(self._finish, run, last)
        return last

    def hand_over(self, name: str, config: TrainConfig) -> None:
        """Begin the run of `config`, in its folder, with the weights and the optimizer that run `name` has here.

        It waits between two steps meanwhile: nobody has asked it to go on.
        """
        run = self._runs[name]
        with run.writing:
            rows = run.recording.log.rows
            about = about_step(run.job, run.member.step, inputs=run.inputs)
            checkpoint = checkpoint_of(run.member.optimizer, rows[-1], about=about)
            begin_from(plan_job(config), checkpoint, rows=rows)

    def _validation(self, job: Job) -> list[Batch]:
        """The held-out records; runs over the same data share them, and the base's loss on them."""
        key = (job.config.data, job.config.micro_batch_size or job.config.batch_size)
        if key not in self._held_out:
            self._held_out[key] = validation_batches(job)
        return self._held_out[key]

    def go_on(self, name: str) -> Metrics | None:
        """Train the run to its next evaluation and return that; None where it is over, and its result is written.

        Raises:
            KeyError: there is no such run (any more).
            FloatingPointError: its loss diverged; it has left.
        """
        with self._changed:
            run = self._runs[name]
            if not run.ready:
                if run.is_over:
                    return None
                run.allowed = run.next_stop if run.member.has_begun else 0
                self._changed.notify_all()
                self._changed.wait_for(lambda: run.ready or self._runs.get(name) is not run)
            if not run.ready:
                raise KeyError(name)
            result = run.ready.popleft()
        if isinstance(result, Exception):
            self.leave(name)
            raise result
        return result

    def present(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that have joined and not left, which none has in a process that began anew."""
        return [name for name in names if name in self._runs]

    def leave(self, name: str) -> None:
        """Its rows go to others; what it has recorded stays, and it may join again."""
        with self._changed:
            run = self._runs.pop(name, None)
            self._changed.notify_all()
        if run is not None:
            with run.writing:  # what it failed of is told to MLflow, and has been to whoever waits for it
                error = run.error
                run.resources.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def _work(self) -> None:
        while True:
            beginning, stepping = self._next_work()
            for runs, work in ((beginning, self._pack.begin), (stepping, self._pack.step)):
                results: Mapping[str, Metrics | Exception]
                try:
                    results = work([run.member for run in runs]) if runs else {}
                except Exception as error:  # of all that were in it; they may join again
                    results = {run.member.name: error for run in runs}
                for run in runs:
                    self._take(run, results[run.member.name], share=1 / len(runs))

    def _next_work(self) -> tuple[list[_Run], list[_Run]]:
        """Runs that may begin, and runs that may step; waits until there are some."""
        with self._changed:
            self._changed.wait_for(lambda: any(run.is_due for run in self._runs.values()))
            self._changed.wait_for(lambda: all(run.is_due for run in self._runs.values()), timeout=TOGETHER_WITHIN_S)
            runs = list(self._runs.values())
            return [run for run in runs if run.may_begin], [run for run in runs if run.may_step]

    def _take(self, run: _Run, result: Metrics | Exception, *, share: float) -> None:
        """Record what a step brought, save where that is due, and tell who waits for it."""
        with run.writing:
            if not self._is_here(run):
                return
            try:
                if isinstance(result, Exception):
                    raise result
                result |= {"workers": share, "peak_worker_bytes": peak_memory_bytes()}
                run.recording.add(result)
                plan, step = run.member.plan, result["step"]
                if step and plan.is_due(step, plan.save_every):
                    about = about_step(run.job, step, inputs=run.inputs)
                    checkpoint = checkpoint_of(run.member.optimizer, result, about=about)
                    config = run.job.config
                    run.job.checkpoints.save(checkpoint, keep_last=config.keep_last, keep_best=config.keep_best)
            except Exception as error:  # of this run alone; the others go on
                self._fail(run, error)
                return
        if run.member.is_done:
            self._finishing.submit(self._finish, run, result)
        elif "eval_loss" in result or not step:
            self._tell(run, result)

    def _finish(self, run: _Run, last: Metrics) -> None:
        """The result and the report, beside the others' steps; only then the last evaluation is told."""
        with run.writing:
            if not self._is_here(run):
                return
            try:
                write_result(run.job, run.member.model, last)
                run.recording.finish(figures_of(run.job, run.recording.log), delta=run.job.result)
            except Exception as error:
                self._fail(run, error)
                return
        self._tell(run, last, is_over=True)

    def _is_here(self, run: _Run) -> bool:
        """It has not left, and maybe joined anew under its name."""
        return self._runs.get(run.member.name) is run

    def _fail(self, run: _Run, error: Exception) -> None:
        run.allowed = -1  # no further: the step may be half made, and its rows are used up
        run.error = error
        run.recording.told.end_by(error)
        self._tell(run, error)

    def _tell(self, run: _Run, result: Metrics | Exception, *, is_over: bool = False) -> None:
        with self._changed:
            run.ready.append(result)
            run.is_over = is_over
            self._changed.notify_all()
