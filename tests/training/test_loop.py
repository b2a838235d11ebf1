"""The loop in one plain process: no Ray, no DeepSpeed."""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from app.config import (
    AdapterConfig,
    BitFitConfig,
    ComposedConfig,
    FullConfig,
    LoraConfig,
    OptimizerConfig,
    PromptConfig,
    TrainConfig,
)
from app.config.base import Precision
from app.config.schema import ChangeConfig
from app.data.batches import Batch, collate
from app.errors import UserError
from app.methods import apply_method
from app.methods.delta import load_trained
from app.models.attention import RowAttention
from app.models.checkpoints import load_decoder
from app.models.decoder import Decoder, DecoderConfig
from app.models.precision import resolve_precision
from app.training import loop
from app.training.checkpoint_store import CheckpointStore
from app.training.checkpointing import Checkpoint
from app.training.interruption import ONE_WISH_S, interruptible
from app.training.loss import masked_nll
from app.training.muon import MuonOptimizer
from app.training.optimizer import PlainOptimizer, trained_parameters
from app.training.precision import LossScale, autocast, store_frozen
from app.training.prefetch import one_ahead
from app.training.schedule import learning_rate

OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


def batches(start_step: int, *, rows: int = 4) -> Iterator[Batch]:
    """Records of uneven length; step s always gets the same ones."""
    for step in itertools.count(start_step):
        draw = torch.Generator().manual_seed(step)
        lengths = torch.randint(4, 20, (rows,), generator=draw).tolist()
        ids = [torch.randint(0, 400, (length,), generator=draw).numpy() for length in lengths]
        yield collate(ids, [(torch.arange(len(row)) >= 2).numpy() for row in ids])


def validation() -> list[Batch]:
    return [batch for batch, _ in zip(batches(1000), range(3), strict=False)]


def train(
    tiny_model: Path,
    *,
    steps: int,
    folder: Path | None = None,
    until: int | None = None,
    signalled_at: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    dropout: float = 0.0,
    precision: Precision = "fp32",
) -> tuple[Decoder, list[loop.Metrics]]:
    """`until` stops early, as a crash would, `signalled_at` as Ctrl-C; a folder with checkpoints is gone on from."""
    model = load_decoder(tiny_model)
    torch.manual_seed(0)
    apply_method(model, LoraConfig(rank=4, dropout=dropout))
    checkpoint = CheckpointStore(folder).latest() if folder else None
    if checkpoint:
        load_trained(model, checkpoint.weights)
    optimizer = PlainOptimizer(model, OPTIMIZER, resume=checkpoint)
    start = checkpoint.step if checkpoint else 0
    seen: list[loop.Metrics] = []

    def report(metrics: loop.Metrics) -> None:
        seen.append(metrics)
        if metrics["step"] == until:
            raise KeyboardInterrupt
        if metrics["step"] == signalled_at:
            signal.raise_signal(signal.SIGINT)

    def save(step: int, metrics: loop.Metrics) -> None:
        if folder:
            CheckpointStore(folder).save(Checkpoint(step, optimizer.weights(), optimizer.moments()), keep_last=2)

    store_frozen(model, precision, torch.device("cpu"))
    plan = loop.Plan(
        steps, eval_every=5, save_every=4, optimizer=OPTIMIZER, precision=precision, seed=7, is_packed=False
    )
    with contextlib.suppress(KeyboardInterrupt):
        loop.run(
            model,
            optimizer,
            plan=plan,
            start_step=start,
            batches=batches(start),
            validation=validation,
            report=report,
            save=save,
            should_stop=should_stop,
        )
    return model, seen


def losses(metrics: list[loop.Metrics]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics if "loss" in row}


def test_a_change_counts_from_the_step_after_it_and_as_if_the_run_had_begun_with_it(tiny_model: Path) -> None:
    """As a run that is stopped there and gone on from with other settings."""
    first = OptimizerConfig(learning_rate=1e-2, schedule="linear", weight_decay=0.1)
    then = first.model_copy(update={"learning_rate": 3e-3, "weight_decay": 0.7})
    changes = (
        ChangeConfig.model_validate({"after": 4, "optimizer": {"learning_rate": 3e-3}, "label_smoothing": 0.2}),
        ChangeConfig.model_validate({"after": 6, "optimizer": {"weight_decay": 0.7}}),
    )

    def run(resume: Checkpoint | None = None, until: int | None = None, **settings: Any) -> tuple[Checkpoint, list]:
        model = load_decoder(tiny_model)
        torch.manual_seed(0)
        apply_method(model, LoraConfig(rank=4))
        if resume:
            load_trained(model, resume.weights)
        given = {"optimizer": first, **settings}
        optimizer = PlainOptimizer(model, given["optimizer"], resume=resume)
        start, seen = resume.step if resume else 0, []
        plan = loop.Plan(9, eval_every=3, save_every=100, precision="fp32", seed=7, is_packed=False, **given)
        last = loop.run(
            model, optimizer, plan=plan, start_step=start, batches=batches(start), validation=validation,
            report=seen.append, save=lambda step, metrics: None, until=until,
        )  # fmt: skip
        return Checkpoint(last, optimizer.weights(), optimizer.moments()), seen

    whole, rows = run(changes=changes)
    stood, told = run(until=4)
    assert stood.step == 4
    for settings in (
        {"optimizer": first.model_copy(update={"learning_rate": 3e-3}), "until": 6},
        {"optimizer": then},
    ):
        stood, more = run(resume=stood, label_smoothing=0.2, **settings)
        told += more
    assert [{**row, "step_s": 0} for row in rows] == [{**row, "step_s": 0} for row in told]
    assert whole.weights.keys() == stood.weights.keys()
    assert all(torch.equal(whole.weights[name], stood.weights[name]) for name in whole.weights)
    assert rows[4]["learning_rate"] == pytest.approx(1e-2 * (0.1 + 0.9 * 5 / 7))
    assert rows[5]["learning_rate"] == pytest.approx(3e-3 * (0.1 + 0.9 * 4 / 7))
    with pytest.raises(ValidationError, match="must rise from one change to the next"):
        TrainConfig(data="a", output="b", changes=changes[::-1])


def test_two_runs_with_one_seed_are_bit_equal(tiny_model: Path) -> None:
    first, second = train(tiny_model, steps=6, dropout=0.3), train(tiny_model, steps=6, dropout=0.3)
    assert losses(first[1]) == losses(second[1])
    for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_continues_the_unbroken_ones_losses_exactly(tiny_model: Path, tmp_path: Path) -> None:
    unbroken = losses(train(tiny_model, steps=12, dropout=0.3)[1])
    _, before = train(tiny_model, steps=12, folder=tmp_path, until=7, dropout=0.3)
    _, after = train(tiny_model, steps=12, folder=tmp_path, dropout=0.3)
    assert max(losses(before)) == 7
    assert min(losses(after)) == 5  # the step after the last checkpoint
    assert {**losses(before), **losses(after)} == unbroken


def test_a_signal_stops_a_plain_run_at_a_saved_step_and_a_resumed_one_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    unbroken = losses(train(tiny_model, steps=12, dropout=0.3)[1])
    told: list[str] = []
    with interruptible(lambda: told.append("once")) as is_interrupted:
        _, before = train(
            tiny_model, steps=12, folder=tmp_path, signalled_at=6, should_stop=is_interrupted, dropout=0.3
        )
    assert told == ["once"]
    assert max(losses(before)) == 7 == CheckpointStore(tmp_path).latest_step(), "the step that runs is finished"
    _, after = train(tiny_model, steps=12, folder=tmp_path, dropout=0.3)
    assert min(losses(after)) == 8
    assert {**losses(before), **losses(after)} == unbroken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once_and_the_old_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible() as is_interrupted:
        signal.raise_signal(number)
        signal.raise_signal(number)  # at once, as `timeout` does: the same wish
        assert is_interrupted()
        time.sleep(1.2 * ONE_WISH_S)
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_only_the_newest_checkpoints_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, steps=12, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008", "step-00000012"]


@pytest.mark.parametrize("file", ["weights.safetensors", "moments.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_told(tiny_model: Path, tmp_path: Path, file: str) -> None:
    train(tiny_model, steps=4, folder=tmp_path)
    (tmp_path / "step-00000004" / file).unlink()
    with pytest.raises(UserError, match="step-00000004' is damaged.*remove that folder"):
        CheckpointStore(tmp_path).latest()


def test_evaluation_is_the_token_weighted_mean(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    with torch.no_grad():
        sums = [masked_nll(model, batch) for batch in validation()]
    expected = sum(nll.item() for nll, _ in sums) / sum(count.item() for _, count in sums)
    result = loop.evaluate(model, validation(), precision="fp32")
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert result["eval_tokens"] == sum(count.item() for _, count in sums)


def test_the_loss_equals_transformers_with_masked_labels(tiny_model: Path) -> None:
    from transformers import GPT2LMHeadModel

    batch = next(batches(3))
    labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(tiny_model).eval()(batch.input_ids, labels=labels).loss
        nll, count = masked_nll(load_decoder(tiny_model), batch)
    assert (nll / count).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan"))
    apply_method(model, LoraConfig(rank=4))
    plan = loop.Plan(3, eval_every=5, save_every=5, optimizer=OPTIMIZER, precision="fp32", seed=0, is_packed=False)
    with pytest.raises(FloatingPointError, match="lower optimizer.learning_rate"):
        loop.run(
            model,
            PlainOptimizer(model, OPTIMIZER),
            plan=plan,
            start_step=0,
            batches=batches(0),
            validation=list,
            report=lambda metrics: None,
            save=lambda step, metrics: None,
        )


def test_bf16_keeps_trained_weights_and_moments_in_fp32(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    apply_method(model, LoraConfig(rank=4))
    optimizer = PlainOptimizer(model, OPTIMIZER)
    with autocast(torch.device("cpu"), "bf16"):
        nll, _ = masked_nll(model, next(batches(0)))
    optimizer.backward(nll)
    optimizer.step(1e-3)
    assert {tensor.dtype for tensor in (optimizer.weights() | optimizer.moments()).values()} == {torch.float32}


def test_frozen_weights_are_stored_as_autocast_would_round_them(tiny_model: Path) -> None:
    sums = []
    for is_stored in (False, True):
        model = load_decoder(tiny_model)
        torch.manual_seed(0)
        apply_method(model, LoraConfig(rank=4))
        if is_stored:
            store_frozen(model, "bf16", torch.device("cpu"))
        with autocast(torch.device("cpu"), "bf16"):
            sums.append(masked_nll(model, next(batches(0)))[0].item())
    assert sums[0] == sums[1]
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert {linear.weight.dtype for linear in linears} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize("kind", [PlainOptimizer, MuonOptimizer])
def test_a_gradient_longer_than_clip_norm_is_cut_to_it_and_a_shorter_one_is_not(tiny_model: Path, kind: type) -> None:
    shares = {".exp_avg": 0.1, ".momentum_buffer": 0.05}  # of the first gradient, in the first moment after it

    def norms(clip_norm: float) -> tuple[float, float]:
        """Of the gradient as it came, and as it was used."""
        model = load_decoder(tiny_model)
        optimizer = kind(model, OPTIMIZER.model_copy(update={"clip_norm": clip_norm}))
        optimizer.backward(masked_nll(model, next(batches(0)))[0])
        came, moments = optimizer.step(1e-3), optimizer.moments()
        used = [moments[key].norm() / share for key in moments for end, share in shares.items() if key.endswith(end)]
        return came, float(torch.stack(used).norm())

    came, used = norms(0.01)
    assert came > 0.01 and used == pytest.approx(0.01, rel=1e-4)
    assert norms(1e9) == pytest.approx((came, came), rel=1e-4)


@pytest.mark.parametrize("kind", [PlainOptimizer, MuonOptimizer])
def test_a_scaled_loss_gives_the_same_step(tiny_model: Path, kind: type) -> None:
    weights = []
    for scale in (1.0, 1024.0):
        model = load_decoder(tiny_model)
        optimizer = kind(model, OPTIMIZER)
        optimizer.backward(masked_nll(model, next(batches(0)))[0], scale=scale)
        norm = optimizer.step(1e-3, scale=scale)
        weights.append((norm, optimizer.weights()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-6)
    for name, weight in weights[0][1].items():
        torch.testing.assert_close(weights[1][1][name], weight)


@pytest.mark.parametrize("kind", [PlainOptimizer, MuonOptimizer])
def test_gradients_that_overflow_under_a_scale_update_nothing(tiny_model: Path, kind: type) -> None:
    model = load_decoder(tiny_model)
    optimizer = kind(model, OPTIMIZER)
    before = optimizer.weights()
    optimizer.backward(masked_nll(model, next(batches(0)))[0] * float("inf"), scale=2.0)
    assert not np.isfinite(optimizer.step(1e-3, scale=2.0))
    for name, weight in optimizer.weights().items():
        assert torch.equal(weight, before[name])
    assert optimizer.moments() and not any(moment.any() for moment in optimizer.moments().values()), "it can be saved"
    optimizer.backward(masked_nll(model, next(batches(0)))[0], scale=2.0)
    assert np.isfinite(optimizer.step(1e-3, scale=2.0))  # nothing of it is left


def test_fp16_trains_fp32_weights_with_a_scaled_loss(tiny_model: Path) -> None:
    model, seen = train(tiny_model, steps=6, precision="fp16")
    _, exact = train(tiny_model, steps=6)
    assert {parameter.dtype for parameter in trained_parameters(model).values()} == {torch.float32}
    assert [row["loss"] for row in seen[1:]] == pytest.approx([row["loss"] for row in exact[1:]], abs=0.02)
    assert all(row["loss_scale"] == 2**16 for row in seen[1:])


def test_the_loss_scale_falls_at_an_overflow_and_grows_again_slowly() -> None:
    scale = LossScale(4.0)
    scale.update(is_finite=False)
    assert scale.value == 2.0
    for _ in range(LossScale.GROWTH_STEPS):
        assert scale.value == 2.0
        scale.update(is_finite=True)
    assert scale.value == 4.0
    with pytest.raises(FloatingPointError, match="use precision=bf16 or fp32"):
        for _ in range(3):
            scale.update(is_finite=False)


def test_a_resumed_loss_scale_goes_on_as_if_nothing_had_been() -> None:
    whole = LossScale(8.0)
    for is_finite in (True, False, True):
        whole.update(is_finite=is_finite)
    resumed = LossScale.after({"loss": 1.0, **whole.state()})
    assert resumed.state() == whole.state() == {"next_loss_scale": 4.0, "steps_at_loss_scale": 1, "steps_left_out": 1}
    assert LossScale.after({"loss": 1.0}).value == LossScale.START


def test_steps_that_an_overflow_left_out_do_not_count_for_adam(tiny_model: Path) -> None:
    model = load_decoder(tiny_model)
    optimizer, metrics = PlainOptimizer(model, OPTIMIZER), LossScale(4.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.backward(masked_nll(model, next(batches(0)))[0] * factor, scale=2.0)
        metrics.update(is_finite=np.isfinite(optimizer.step(1e-3, scale=2.0)))
    checkpoint = Checkpoint(3, optimizer.weights(), optimizer.moments(), {"metrics": metrics.state()})
    resumed_model = load_decoder(tiny_model)
    load_trained(resumed_model, checkpoint.weights)
    resumed = PlainOptimizer(resumed_model, OPTIMIZER, resume=checkpoint)
    for each, its in ((model, optimizer), (resumed_model, resumed)):
        its.backward(masked_nll(each, next(batches(1)))[0])
        its.step(1e-3)
    for name, weight in optimizer.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name


@pytest.mark.parametrize(("instructions", "chosen"), [({"avx2": True}, "fp32"), ({"avx512_bf16": True}, "bf16")])
def test_auto_precision_is_bf16_only_where_the_cpu_has_it(
    instructions: dict[str, bool], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert resolve_precision("auto", torch.device("cpu")) == chosen
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_muon_resumes_exactly(tiny_model: Path) -> None:
    def steps(model: Decoder, optimizer: MuonOptimizer, first: int, last: int) -> None:
        for batch in itertools.islice(batches(first), last - first):
            optimizer.backward(masked_nll(model, batch)[0])
            optimizer.step(1e-3)

    unbroken = load_decoder(tiny_model)
    optimizer = MuonOptimizer(unbroken, OPTIMIZER)
    steps(unbroken, optimizer, 0, 2)
    checkpoint = Checkpoint(2, optimizer.weights(), optimizer.moments())
    steps(unbroken, optimizer, 2, 4)
    resumed = load_decoder(tiny_model)
    load_trained(resumed, checkpoint.weights)
    steps(resumed, MuonOptimizer(resumed, OPTIMIZER, resume=checkpoint), 2, 4)
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_updates_as_torchs_own_does(tiny_model: Path) -> None:
    ours, theirs = load_decoder(tiny_model), load_decoder(tiny_model)
    optimizer = MuonOptimizer(ours, OPTIMIZER)
    matrices = {name: p for name, p in theirs.named_parameters() if p.dim() == 2 and name.startswith("blocks.")}
    reference = torch.optim.Muon(
        list(matrices.values()), lr=1e-2, weight_decay=OPTIMIZER.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    gradients = {name: p.clone() for name, p in ours.named_parameters()}
    for scale in (0.001, 0.002):  # below the clipping norm
        for model in (ours, theirs):
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name] * scale
        optimizer.step(1e-2)
        reference.step()
    for name, parameter in matrices.items():
        mine = ours.get_parameter(name)
        start = gradients[name]
        assert not torch.equal(mine, start)
        # theirs iterates in bf16, which keeps two digits of the update
        assert (mine - parameter).norm() < 0.05 * (parameter - start).norm()


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_the_learning_rate_warms_up_then_follows_its_schedule(schedule: str, last: float) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1, schedule=schedule)
    rates = [learning_rate(step, config, total_steps=100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(last)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    halfway = {"cosine": 0.55, "linear": 0.55, "constant": 1.0}
    assert rates[54] == pytest.approx(halfway[schedule], abs=0.02)
    quarter = {"cosine": 0.87, "linear": 0.78, "constant": 1.0}
    assert rates[32] == pytest.approx(quarter[schedule], abs=0.02)


def test_a_trapezoid_stays_at_its_peak_then_falls_in_a_line() -> None:
    config = OptimizerConfig(
        learning_rate=2.0, schedule="trapezoid", warmup_fraction=0.1, decay_fraction=0.25, final_fraction=0.0
    )
    rates = [learning_rate(step, config, total_steps=40) for step in range(40)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[3:30] == [2.0] * 27
    assert rates[29:] == pytest.approx([2.0 - 0.2 * step for step in range(11)])
    # another length changes nothing before the fall begins: a run can be drawn out from there
    longer = [
        learning_rate(step, config.model_copy(update={"warmup_fraction": 0.05}), total_steps=80) for step in range(60)
    ]
    assert longer[:30] == rates[:30]


def test_a_trapezoid_whose_slopes_overlap_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"warmup_fraction=0.5 and decay_fraction=0.6 .* lower one"):
        OptimizerConfig(schedule="trapezoid", warmup_fraction=0.5, decay_fraction=0.6)


def gradients(tiny_model: Path, batch: Batch, *, parts: int, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    """Of the mean loss over a batch, computed in `parts`."""
    model = load_decoder(tiny_model).train()
    torch.manual_seed(0)
    apply_method(model, ComposedConfig(parts=(LoraConfig(rank=4), PromptConfig(length=3))))
    model.checkpoint_blocks = checkpointing
    optimizer = PlainOptimizer(model, OPTIMIZER)
    plan = loop.Plan(1, 1, 1, OPTIMIZER, "fp32", 0, is_packed=False, micro_batches=parts)
    loop._backward(model, optimizer, batch, plan=plan, token_count=batch.loss_tokens)
    return {name: parameter.grad for name, parameter in trained_parameters(model).items()}


@pytest.mark.parametrize("parts", [2, 3, 4, 6])
def test_gradients_do_not_depend_on_the_micro_batches(tiny_model: Path, parts: int) -> None:
    """Of uneven lengths, also in more parts than rows: a mean over each part would weigh its tokens differently."""
    batch = next(batches(5))
    whole, added = gradients(tiny_model, batch, parts=1), gradients(tiny_model, batch, parts=parts)
    for name, gradient in whole.items():
        assert (gradient - added[name]).norm() <= 1e-5 * gradient.norm(), name


def test_micro_batches_of_any_size_train_alike_for_twenty_steps(tiny_model: Path) -> None:
    """32 records at once, one by one, and in twos of 16: the same losses at every step, and the same gradients.

    Those are compared closely where the weights are equal: AdamW makes as much of a gradient that is all rounding as of
    any other, so that weights, and with them gradients, part by more than the rounding of a step.
    """

    def seen(parts: int) -> list[tuple[float, float]]:
        model = load_decoder(tiny_model)
        torch.manual_seed(0)
        apply_method(model, LoraConfig(rank=4))
        plan = loop.Plan(20, 20, 20, OPTIMIZER, "fp32", 0, is_packed=False, micro_batches=parts)
        rows: list[loop.Metrics] = []
        loop.run(
            model,
            PlainOptimizer(model, OPTIMIZER),
            plan=plan,
            start_step=0,
            batches=batches(0, rows=32),
            validation=list,
            report=rows.append,
            save=lambda step, metrics: None,
        )
        return [(row["loss"], row["gradient_norm"]) for row in rows[1:]]

    at_once = np.array(seen(1))
    for parts in (2, 32):
        in_parts = np.array(seen(parts))
        np.testing.assert_allclose(in_parts[:, 0], at_once[:, 0], rtol=1e-5)
        np.testing.assert_allclose(in_parts[0, 1], at_once[0, 1], rtol=1e-5)
        np.testing.assert_allclose(in_parts[:, 1], at_once[:, 1], rtol=1e-4)


def test_the_next_batch_is_prepared_while_one_trains() -> None:
    made: list[int] = []
    is_second_made = threading.Event()

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            if number == 1:
                is_second_made.set()
            yield number
        raise OSError("no more")

    ahead = one_ahead(items())
    assert next(ahead) == 0
    assert is_second_made.wait(10), "made before it is asked for"
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(OSError, match="no more"):
        next(ahead)
    assert made == [0, 1, 2] and list(one_ahead(iter([]))) == []


def test_compiled_blocks_compute_the_same_without_compiling_anew_for_each_batch(tiny_model: Path) -> None:
    def packed(step: int) -> Batch:
        draw = np.random.default_rng(step)
        lengths = [draw.integers(3, 15, 3 + (step + row) % 4) for row in range(2)]
        rows = [draw.integers(0, 400, of_row.sum()) for of_row in lengths]
        return collate(rows, [np.ones(len(row), dtype=bool) for row in rows], lengths)

    sums, graphs = [], []
    for is_compiled in (False, True):
        model = load_decoder(tiny_model).train()
        torch.manual_seed(0)
        apply_method(model, LoraConfig(rank=4))
        if is_compiled:
            model.compile_blocks()
        for step in range(4):
            nll, _ = masked_nll(model, packed(step))
            nll.backward()
            sums.append(nll.item())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert sums[4:] == pytest.approx(sums[:4], rel=1e-5)
    assert graphs[5] > graphs[3] and len(set(graphs[6:])) == 1


def test_attention_in_bf16_is_not_compiled_anew_for_each_number_of_documents() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: RowAttention) -> torch.Tensor:
        return rows.attend(0, q * 2, k, v) * 2

    compiled = torch.compile(attend, backend="eager", dynamic=True)
    counts = []
    for lengths in ([40, 30], [10, 20, 40], [70], [5] * 14):
        parts = [torch.randn(1, 3, 70, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
        torch.testing.assert_close(compiled(*parts, RowAttention(documents)), attend(*parts, RowAttention(documents)))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(counts[1:])) == 1


def test_a_model_deeper_than_the_compilers_limit_is_compiled_once_for_all_blocks() -> None:
    shape = DecoderConfig(64, 32, num_layers=12, num_heads=2, width=16, mlp_width=32)
    model = Decoder(shape)
    model.initialize(generator=torch.Generator().manual_seed(0))
    ids = torch.arange(24).unsqueeze(0)
    plain = model(ids)
    torch._dynamo.reset()  # what other tests compiled counts too
    model.compile_blocks()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4, fail_on_recompile_limit_hit=True):
        torch.testing.assert_close(model(ids), plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before < shape.num_layers


@pytest.mark.parametrize(
    "method",
    [FullConfig(), LoraConfig(), LoraConfig(dora=True, dropout=0.1), AdapterConfig(size=8), BitFitConfig()],
    ids=["full", "lora", "dora", "adapter", "bitfit"],
)
def test_no_technique_breaks_a_blocks_graph(method) -> None:
    """Where one did, LoRA on a GPU trained slower compiled than not."""
    model = Decoder(DecoderConfig(64, 32, num_layers=2, num_heads=2, width=16, mlp_width=32))
    model.initialize(generator=torch.Generator().manual_seed(0))
    apply_method(model, method)
    store_frozen(model, "bf16", torch.device("cpu"))
    model.attention = "math"
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(dynamic=True, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True), autocast(torch.device("cpu"), "bf16"):
        model(torch.arange(24).unsqueeze(0)).sum().backward()


def test_parts_beyond_the_rows_cost_no_position(tiny_model: Path) -> None:
    """A packed row may be longer than the context, of which each of its documents is within."""
    row = collate([np.arange(120)], [np.ones(120, dtype=bool)], [np.array([60, 60])])
    whole, added = gradients(tiny_model, row, parts=1), gradients(tiny_model, row, parts=2)
    for name, gradient in whole.items():
        torch.testing.assert_close(added[name], gradient)


def test_a_mean_over_each_micro_batch_would_be_something_else(tiny_model: Path) -> None:
    batch = next(batches(5))
    whole, wrong = gradients(tiny_model, batch, parts=1), {}
    for part in batch.split(4):
        for name, gradient in gradients(tiny_model, part, parts=1).items():
            wrong[name] = wrong.get(name, 0) + gradient / 4
    assert any((gradient - wrong[name]).norm() > 1e-2 * gradient.norm() for name, gradient in whole.items())


def test_checkpointed_blocks_give_the_same_gradients_over_frozen_layers(tiny_model: Path) -> None:
    batch = next(batches(5))
    plain, again = gradients(tiny_model, batch, parts=1), gradients(tiny_model, batch, parts=1, checkpointing=True)
    for name, gradient in plain.items():
        assert gradient.norm() > 0 or name.endswith("lora_a"), name
        torch.testing.assert_close(again[name], gradient)


def test_checkpointed_blocks_keep_less_for_the_backward_pass(tiny_model: Path) -> None:
    def kept_bytes(checkpointing: bool) -> int:
        model = load_decoder(tiny_model).train()
        model.checkpoint_blocks = checkpointing
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            masked_nll(model, next(batches(5)))
        return kept

    assert kept_bytes(True) < 0.5 * kept_bytes(False)
