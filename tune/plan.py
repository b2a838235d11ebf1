"""What of a sweep can be checked before a trial starts, and what it needs; without Ray."""

from app.config.schema import TrainConfig
from app.config.sweep import PopulationConfig, Range, SweepConfig
from app.errors import UserError, check_not_masked
from app.training.pack import why_not_packed
from tune.space import Checked, check_space, num_combinations


def plan_sweep(config: SweepConfig) -> Checked:
    """Check all that can be checked before a trial starts.

    Raises:
        UserError: a setting, data, model or technique that a trial could not start with.
    """
    check_not_masked("train.checkpoints", config.train.get("checkpoints"))
    check_not_masked("tracking.uri", config.tracking.uri)
    checked = check_space(config)
    if packed_of(config, checked):
        _check_bases(config)
    total = most_trials(config)
    if config.search.type == "grid" and config.budget.trials and total and config.budget.trials < total:
        raise UserError(
            f"budget.trials={config.budget.trials} is less than the grid's {total} combinations; leave it out, or take "
            "search.type=random"
        )
    if config.budget.cost is not None:
        for trial in checked.trials:
            if trial.workers.price_per_hour is None:
                raise UserError("budget.cost needs a price; set train.workers.price_per_hour")
    if isinstance(config.scheduler, PopulationConfig):
        _check_population(config.scheduler, config, checked)
    return checked


def _check_bases(config: SweepConfig) -> None:
    """
    Raises:
        UserError: which packs there are to be does not follow from the space.
    """
    for number, branch in enumerate(config.space):
        for key in ("workers.cpus", "workers.gpus", "workers.threads"):
            if isinstance(branch.get(key), Range):
                where = f"space.{number}: " if len(config.space) > 1 else "space: "
                raise UserError(
                    f"{where}{key} is a range, and trials of one pack have the same workers: each value needs a pack, "
                    "which starts before the first trial; give a list of values, or set pack=never"
                )


def _check_population(scheduler: PopulationConfig, config: SweepConfig, checked: Checked) -> None:
    if most_trials(config) == 1:
        raise UserError("space: a population has two trials at least, and the grid has one combination; add to it")
    every, evaluated = scheduler.every, {trial.eval_every for trial in checked.trials}
    if checked.least_steps < checked.most_steps or len(evaluated) > 1:
        raise UserError(
            "space: the trials of a population make as many steps each, and are evaluated after the same ones; take "
            "epochs, max_steps, eval_every and, without max_steps, batch_size out of the space"
        )
    if every % max(evaluated):
        raise UserError(
            f"scheduler.every={every}: trials are compared by their held-out losses, so it must be a multiple of "
            f"train.eval_every={max(evaluated)}"
        )
    if every >= checked.most_steps:
        raise UserError(f"scheduler.every={every} is no less than the {checked.most_steps} steps of a trial; lower it")
    if any(trial.changes for trial in checked.trials):
        raise UserError("changes: those of a population's trials are what its exchanges make; leave them out")
    bases = {base_of(trial) for trial in packed_of(config, checked)}
    if bases and (len(bases) > 1 or alone_of(config, checked)):
        raise UserError(
            "pack='auto': trials of a population take over from each other, so all are packed over one base with the "
            "same precision and workers, or none is; set pack=never"
        )


def needed_resources(config: SweepConfig, checked: Checked) -> tuple[float, float]:
    """CPUs and GPUs that must be there at once: a pack's for each base, and the largest run of its own."""
    packs = {base_of(trial): trial.workers for trial in packed_of(config, checked)}
    alone = [trial.workers for trial in alone_of(config, checked)]
    return (
        sum(workers.cpus for workers in packs.values()) + max((w.least * w.cpus for w in alone), default=0.0),
        sum(workers.gpus for workers in packs.values()) + max((w.least * w.gpus for w in alone), default=0.0),
    )


def most_trials(config: SweepConfig) -> int | None:
    """None where another budget than their number ends them."""
    if config.search.type == "grid":
        return sum(map(num_combinations, config.space))
    return config.budget.trials


def base_of(trial: TrainConfig) -> str:
    """What trials of one pack have in common."""
    return f"{trial.model} {trial.precision} {trial.workers.model_dump_json(exclude={'count', 'price_per_hour'})}"


def packed_of(config: SweepConfig, checked: Checked) -> list[TrainConfig]:
    return [trial for trial in checked.trials if config.pack == "auto" and not why_not_packed(trial)]


def alone_of(config: SweepConfig, checked: Checked) -> list[TrainConfig]:
    return [trial for trial in checked.trials if config.pack == "never" or why_not_packed(trial)]
