"""The training loop: batches -> loss -> step -> evaluation -> checkpoint. The same alone and on many workers.

It is given everything it does: where batches come from, how weights are updated, what to do with metrics and
checkpoints. It knows no Ray, no DeepSpeed and no files.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from app.config.base import Precision
from app.config.schema import ChangeConfig, OptimizerConfig
from app.data.batches import Batch
from app.models.attention import Rows, choose_backend
from app.models.decoder import Decoder
from app.models.kernels import clamped_relu, cross_entropy
from app.models.precision import compute_dtype, resolve_precision
from app.training.allocator import keep_freed_memory
from app.training.loss import masked_nll
from app.training.optimizer import Optimizer
from app.training.precision import LossScale, autocast
from app.training.prefetch import one_ahead
from app.training.schedule import learning_rate
from app.training.workers import rank, sum_over_workers, world_size

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """When what happens, in optimizer steps."""

    total_steps: int
    eval_every: int
    save_every: int
    optimizer: OptimizerConfig
    precision: Precision
    seed: int
    is_packed: bool
    """Whether rows hold several documents."""
    micro_batches: int = 1
    """Into how many a worker's rows of a step are split; their gradients add up."""
    label_smoothing: float = 0.0
    changes: Sequence[ChangeConfig] = ()

    def at(self, step: int) -> "Plan":
        """With the settings of `step`, counted from 1."""
        made = [change for change in self.changes if change.after < step]
        if not made:
            return self
        optimizer = {key: value for change in made if change.optimizer for key, value in change.optimizer.given.items()}
        smoothing = [change.label_smoothing for change in made if change.label_smoothing is not None]
        return replace(
            self,
            optimizer=self.optimizer.model_copy(update=optimizer),
            label_smoothing=smoothing[-1] if smoothing else self.label_smoothing,
        )

    def is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.total_steps


def run(
    model: Decoder,
    optimizer: Optimizer,
    *,
    plan: Plan,
    start_step: int,
    batches: Iterator[Batch],
    validation: Callable[[], Iterable[Batch]],
    report: Callable[[Metrics], None],
    save: Callable[[int, Metrics], None],
    should_stop: Callable[[], bool] = lambda: False,
    until: int | None = None,
    loss_scale: LossScale | None = None,
) -> int:
    """Train from `start_step` to `plan.total_steps`, or to `until` before it; returns the last step made.

    `batches` yields this worker's part of the steps from `start_step` on; every worker must get as many. `report`
    and `save` are called on every worker, `save(step, metrics)` with the metrics of that step. Where `should_stop()` is
    true on any worker, all save the step that runs and stop; after `until` they save as well. fp16 starts with
    `loss_scale`.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    model.train()
    precision = resolve_precision(plan.precision, device)
    scale = (loss_scale or LossScale()) if precision == "fp16" else None
    kernels = {
        "attention": training_attention(model, device=device, precision=precision, is_packed=plan.is_packed),
        "cross_entropy": cross_entropy.version_on(device),
    }
    if model.config.activation == "clamped_relu":
        kernels["clamped_relu"] = clamped_relu.version_on(device)
    if start_step == 0:
        first = {"step": 0, "precision": precision, "kernels": kernels}
        report({**first, **evaluate(model, validation(), precision=plan.precision)})
    batches = one_ahead(batches)
    last_step = plan.total_steps if until is None else until
    for step in range(start_step + 1, last_step + 1):
        started = time.perf_counter()
        # Dropout draws from the step's own seed, so that a resumed run draws what an unbroken one would have.
        torch.manual_seed((plan.seed * 1_000_003 + step) * 4099 + rank())
        now = plan.at(step)
        rate = learning_rate(step - 1, now.optimizer, total_steps=plan.total_steps)
        batch = next(batches)
        token_count, num_tokens = sum_over_workers(batch.loss_tokens, batch.num_tokens, device=device)
        factor = scale.value if scale else 1.0
        nll = _backward(model, optimizer, batch.to(device), plan=now, token_count=token_count, scale=factor)
        gradient_norm = optimizer.step(rate, weight_decay=now.optimizer.weight_decay, scale=factor)
        # Looked at after the step is queued: to read a number from a GPU is to wait for all that comes before it.
        nll_sum, num_stopping = sum_over_workers(nll.item(), float(should_stop()), device=device)
        check_finite(nll_sum, "loss", step)
        metrics: Metrics = {
            "step": step,
            "loss": nll_sum / max(1.0, token_count),
            "learning_rate": rate,
            "tokens": num_tokens,
            "step_s": time.perf_counter() - started,
        }
        if scale is None:
            check_finite(gradient_norm, "gradient's norm", step)  # before such weights are saved
        else:
            metrics["loss_scale"] = factor
            scale.update(is_finite=math.isfinite(gradient_norm))
            metrics |= scale.state()
        if math.isfinite(gradient_norm):  # else the step was left out
            metrics["gradient_norm"] = gradient_norm
        if plan.is_due(step, plan.eval_every):
            metrics |= evaluate(model, validation(), precision=plan.precision)
        report(metrics)
        if num_stopping or step == last_step or plan.is_due(step, plan.save_every):
            save(step, metrics)
        if num_stopping:
            return step
    return last_step


def _backward(
    model: Decoder, optimizer: Optimizer, batch: Batch, *, plan: Plan, token_count: float, scale: float = 1.0
) -> Tensor:
    """Add up the gradients of the mean loss over all workers' `token_count` tokens; returns this worker's sum of it.

    The mean is not over each micro-batch or worker: those have uneven numbers of tokens, and a token should count the
    same wherever it is. Gradients are averaged over workers afterwards, hence world_size().
    """
    device = batch.input_ids.device
    nll_sum = torch.zeros((), device=device)
    for number, micro_batch in enumerate(batch.split(plan.micro_batches), start=1):
        with autocast(device, plan.precision):
            nll, _ = masked_nll(model, micro_batch, smoothing=plan.label_smoothing)
        loss = nll * (world_size() / max(1.0, token_count))
        optimizer.backward(loss, scale=scale, is_last=number == plan.micro_batches)
        nll_sum += nll.detach()
    return nll_sum


def training_attention(model: Decoder, *, device: torch.device, precision: Precision, is_packed: bool) -> str:
    """The kernel that will compute attention.

    Raises:
        UserError: `model.attention` cannot do so.
    """
    shape = model.config
    dtype = compute_dtype(precision, device)
    has_prefix = model.prefix_length > 0
    rows = Rows(shape.num_heads, shape.kv_heads, shape.head_width, device, dtype, is_packed, has_prefix)
    return choose_backend(model.attention, rows)


def check_finite(value: float, name: str, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value} at step {step}; lower optimizer.learning_rate")


@torch.no_grad()
def evaluate(model: Decoder, batches: Iterable[Batch], *, precision: Precision) -> Metrics:
    """Held-out loss (nats per token) and perplexity over all workers' `batches`; holds sums only, never logits."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nll_sum = token_count = 0.0
    for batch in batches:
        with autocast(device, precision):
            nll, count = masked_nll(model, batch.to(device))
        nll_sum += nll.item()
        token_count += count.item()
    model.train(was_training)
    return held_out_metrics(*sum_over_workers(nll_sum, token_count, device=device))


def held_out_metrics(nll_sum: float, token_count: float) -> Metrics:
    """What is told of an evaluation; nothing where there is nothing to evaluate on."""
    if not token_count:
        return {}
    loss = nll_sum / token_count
    return {"eval_loss": loss, "perplexity": math.exp(min(loss, 700)), "eval_tokens": int(token_count)}
