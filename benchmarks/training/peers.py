"""Hugging Face `Trainer` with `peft`, as its users run it, as an earlier project did, and tuned as well as it goes."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.training.task import ALPHA, LEARNING_RATE, MAX_LENGTH, RANK, RECORDS_PER_STEP, SEED, Task, read_groups

Row = dict[str, list[int]]
Collator = Callable[[list[Row]], dict[str, Any]]

HELD_OUT_ROWS = 2
"""Computed at once: their logits must not be what memory peaks at."""


@dataclass(frozen=True)
class Peer:
    autocast: bool = False
    """bf16=True, over fp32 weights."""
    bf16_weights: bool = False
    collate: str = "dynamic"
    """`dynamic` pads to the longest of a step; `fixed` pads to 512, with labels on everything; `flat` lays the records
    end to end in one row, each blind to the others."""
    dropout: bool = True
    """GPT-2's own 0.1, which is on in a GPT-2 folder."""
    micro_batches: int = 1
    """Of a step: 16 padded rows at once take more than 23 GiB."""
    is_fast: bool = False


PEERS = {
    "trainer_fp32": Peer(),
    "trainer_bf16": Peer(autocast=True),
    "pad_512": Peer(collate="fixed", micro_batches=2),
    "trainer_tuned_fp32": Peer(collate="flat", dropout=False, is_fast=True),
    "trainer_tuned_bf16": Peer(collate="flat", dropout=False, bf16_weights=True, is_fast=True),
}


def train(task: Task, peer: Peer) -> dict[str, Any]:
    """Run a peer; it has the process for itself."""
    import torch
    from transformers import Trainer, TrainingArguments

    from app.training.trainer import peak_memory_bytes

    torch.set_num_threads(task.threads)
    groups, held_out = read_groups(task)
    model, total_steps = _model(task, peer), task.total_steps(is_fast=peer.is_fast)
    steps = groups[:total_steps]
    if peer.collate == "flat":
        _check_isolation(model, held_out)
    watch = stopwatch(model, held_out, pass_steps=1 + task.steps)
    arguments = TrainingArguments(
        output_dir=str(task.path(f"trainer-{os.getpid()}")),
        per_device_train_batch_size=RECORDS_PER_STEP // peer.micro_batches,
        gradient_accumulation_steps=peer.micro_batches,
        max_steps=total_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        train_sampling_strategy="sequential",  # the groups come in the order of the feed
        bf16=peer.autocast,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[row for group in steps for row in group],
        data_collator=_collator(task, peer),
        callbacks=[watch],
    )
    trainer.train()
    tokens = [sum(len(row["input_ids"]) for row in group) for group in steps]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    figures = zip(watch.seconds, tokens, losses, strict=True)
    return {
        "steps": [{"seconds": seconds, "tokens": count, "loss": loss} for seconds, count, loss in figures],
        "held_out_loss": watch.held_out_loss,
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "computed_in": "bf16" if peer.autocast or peer.bf16_weights else "fp32",
        "peak_bytes": peak_memory_bytes(),
    }


def _model(task: Task, peer: Peer) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    options = {} if peer.dropout else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    dtype = torch.bfloat16 if peer.bf16_weights else torch.float32
    model = GPT2LMHeadModel.from_pretrained(task.path("model"), dtype=dtype, **options)
    # transformers tells records end to end by their positions, and only where there is no KV cache.
    model.config.use_cache = False
    torch.manual_seed(SEED)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["c_attn", "c_proj", "c_fc"],  # c_proj is in attention and in the MLP
        fan_in_fan_out=True,
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=not peer.bf16_weights)


def _collator(task: Task, peer: Peer) -> Collator:
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

    if peer.collate == "flat":
        return DataCollatorWithFlattening()
    if peer.collate == "fixed":
        return _pad_to_512(_tokenizer(task).eos_token_id)
    return DataCollatorForSeq2Seq(_tokenizer(task))


def _tokenizer(task: Task) -> Any:
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained(task.path("model"))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pad_to_512(pad_id: int) -> Collator:
    """Every row 512 tokens long, and every token a label, padding too: what that earlier project trained."""
    import torch

    def collate(rows: list[Row]) -> dict[str, Any]:
        ids = torch.full((len(rows), MAX_LENGTH), pad_id)
        for place, row in zip(ids, rows, strict=True):
            place[: len(row["input_ids"])] = torch.tensor(row["input_ids"])
        return {"input_ids": ids, "labels": ids.clone()}

    return collate


def stopwatch(model: Any, held_out: list[Row], *, pass_steps: int) -> Any:
    """A callback that takes each step's seconds, data included, and the held-out loss before and after each pass."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.held_out_loss: dict[str, float] = {}
            self._started = 0.0

        def on_train_begin(self, arguments: Any, state: Any, control: Any, **rest: Any) -> None:
            self.held_out_loss["0"] = held_out_loss(model, held_out)
            self._started = time.perf_counter()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **rest: Any) -> None:
            self.seconds.append(time.perf_counter() - self._started)
            if state.global_step % pass_steps == 0 or state.global_step == state.max_steps:
                self.held_out_loss[str(state.global_step)] = held_out_loss(model, held_out)
            self._started = time.perf_counter()

    return Stopwatch()


def held_out_loss(model: Any, rows: list[Row]) -> float:
    """Nats per labelled token, in evaluation mode and without autocast; leaves the model in training mode."""
    import torch
    import torch.nn.functional as F
    from torch.nn.utils.rnn import pad_sequence

    model.eval()
    total = count = 0.0
    for first in range(0, len(rows), HELD_OUT_ROWS):
        chosen = rows[first : first + HELD_OUT_ROWS]
        ids, labels = (
            pad_sequence([torch.tensor(row[name]) for row in chosen], batch_first=True, padding_value=padding)
            for name, padding in (("input_ids", 0), ("labels", -100))
        )
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1]
            total += F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] >= 0).sum())
    model.train()
    return total / count


def _check_isolation(model: Any, rows: list[Row]) -> None:
    """Records laid end to end must not see each other: the loss is that of the same records apart.

    Raises:
        AssertionError: it is not.
    """
    import torch
    from transformers import DataCollatorWithFlattening

    apart = held_out_loss(model, rows)
    model.eval()
    with torch.no_grad():
        together = model(**DataCollatorWithFlattening()(rows)).loss.item()
    model.train()
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 3e-2
    assert abs(apart - together) < tolerance, f"end to end the loss is {together}, apart {apart}"
