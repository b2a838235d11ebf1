"""Training runs that share one frozen base, in one process: one forward pass for the rows of all.

Each run has its own trained weights, optimizer, learning rate, schedule, data and end; what they share is the base. A
pass lays the rows of several runs end to end, without padding. The base's layers compute all of them at once; then each
run's rows get what its technique makes of the result (`methods/over_base.py`), and attend behind its own prefix. So a
run's losses are those that it would have alone, in `loop.py`, but for the order of sums; a run may join or leave
between any two steps.

Knows no Ray and no files.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from app.config.base import Precision
from app.config.methods import LoraConfig, MethodConfig, parts_of
from app.config.schema import TrainConfig
from app.data.batches import Batch
from app.methods import apply_method
from app.methods.delta import load_trained
from app.methods.lora import DoraLinear
from app.methods.over_base import shared_copy
from app.models.attention import RowAttention
from app.models.decoder import Decoder
from app.models.kernels import cross_entropy
from app.models.kernels.cross_entropy import fused_cross_entropy
from app.models.precision import resolve_precision
from app.models.quantization import QuantizedLinear
from app.training.allocator import keep_freed_memory
from app.training.checkpointing import Checkpoint
from app.training.loop import Metrics, Plan, check_finite, held_out_metrics, training_attention
from app.training.optimizer import PlainOptimizer
from app.training.pack_sites import Site
from app.training.pieces import Piece, pieces_of
from app.training.precision import autocast, store_frozen
from app.training.schedule import learning_rate

PASS_TOKENS = 2048
_PACKED = {"lora", "adapter", "prefix", "prompt"}


def why_not_packed(config: TrainConfig) -> str | None:
    """What about a run keeps it from sharing a base with others; None where nothing does."""
    kinds = {part.type for part in parts_of(config.method)}
    if kinds - _PACKED:
        return f"method.type={min(kinds - _PACKED)!r} trains weights of the base, or adds blocks to it"
    if any(isinstance(part, LoraConfig) and part.dropout for part in parts_of(config.method)):
        return "method.dropout draws from one random stream for all rows"
    settings = {
        "workers.count": (config.workers.count, 1),
        "attention": (config.attention, "auto"),
        "gradient_checkpointing": (config.gradient_checkpointing, False),
        "compile": (config.compile, False),
        "samples": (config.samples, 0),
    }
    for name, (value, wanted) in settings.items():
        if value != wanted:
            return f"{name}={value!r}, and packed runs have {wanted!r}"
    if config.precision == "fp16":
        return "precision='fp16' scales the loss, for all rows alike"
    return None


@dataclass(eq=False)
class Member:
    """A run in the pack."""

    name: str
    model: Decoder
    """The base's tensors, with modules of the run's own."""
    layers: dict[str, nn.Module]
    """By the name of the base's layer, what stands in its place."""
    optimizer: PlainOptimizer
    plan: Plan
    batches: Iterator[Batch]
    """From the run's next step on."""
    validation: Sequence[Piece]
    step: int
    """Of those that were made."""
    has_begun: bool
    """Whether the loss before training has been told."""

    @property
    def is_done(self) -> bool:
        return self.step >= self.plan.total_steps

    @property
    def prefix_length(self) -> int:
        return self.model.prefix_length

    @property
    def starts_at_base(self) -> bool:
        """Whether its first outputs are the base's to the last bit: LoRA and adapters add what is zero at first."""
        modules = [module for layer in self.layers.values() for module in layer.modules()]
        return self.model.prefix is None and not any(isinstance(module, DoraLinear) for module in modules)


@dataclass(eq=False)
class _Work:
    """What a member computes in a step, or in an evaluation."""

    member: Member
    pieces: Sequence[Piece]
    scale: float = 1.0
    """Of its loss, in the sum of which the gradient is taken."""
    nll: float = 0.0
    num_labels: int = field(init=False)
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_labels = sum(len(piece.labels) for piece in self.pieces)
        self.num_tokens = sum(piece.num_tokens for piece in self.pieces)


_Rows = list[tuple[_Work, list[Piece]]]
"""What one pass computes: a member's rows after another's."""


class Pack:
    """`base`, whose weights stay as they are, for the runs that train over it: each step's are those that it is given.

    Rows go through the base in passes of at most `pass_tokens`, or of one row that is longer: that bounds the memory,
    however many runs there are.
    """

    def __init__(
        self, base: Decoder, *, precision: Precision, device: torch.device, pass_tokens: int = PASS_TOKENS
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.device = device
        self.precision = precision
        self.pass_tokens = pass_tokens
        self.base = base.to(device).requires_grad_(False)
        store_frozen(self.base, precision, device)
        self._pieces: dict[int, tuple[Sequence[Batch], list[Piece]]] = {}
        """Of held-out batches, by their list, which runs over the same data should share."""
        self._base_losses: dict[int, Metrics] = {}
        """Of the base alone, on the same."""
        self._decoder, _ = shared_copy(self.base)
        self._sites: dict[str, Site] = {}
        for name, module in list(self._decoder.named_modules()):
            if isinstance(module, nn.Linear | QuantizedLinear):
                self._sites[name] = Site(module)
                parent, _, attribute = name.rpartition(".")
                setattr(self._decoder.get_submodule(parent), attribute, self._sites[name])

    def new_member(
        self,
        name: str,
        method: MethodConfig,
        *,
        plan: Plan,
        batches: Callable[[int], Iterator[Batch]],
        validation: Sequence[Batch] = (),
        resume: Checkpoint | None = None,
    ) -> Member:
        """A run of `method` from its beginning, or from where `resume` stands; `batches(step)` yields its rows from
        that step on. Initial weights are drawn from the plan's seed, as they are for a run alone.

        Raises:
            UserError: the technique does not fit the base, or the checkpoint not the technique.
        """
        model, _ = shared_copy(self.base)
        torch.manual_seed(plan.seed)
        with autocast(self.device, self.precision):  # frozen layers are stored in its format
            apply_method(model, method)
        if resume is not None:
            load_trained(model, resume.weights)
        model.train()
        step = resume.step if resume is not None else 0
        return Member(
            name,
            model,
            layers={site: layer for site in self._sites if _is_own(layer := model.get_submodule(site))},
            optimizer=PlainOptimizer(model, plan.optimizer, resume=resume),
            plan=plan,
            batches=batches(step),
            validation=self._held_out(validation),
            step=step,
            has_begun=resume is not None,
        )

    def begin(self, members: Sequence[Member]) -> dict[str, Metrics]:
        """The first report of each of these, as `loop.run` makes it: the held-out loss before any step."""
        attention = training_attention(self.base, device=self.device, precision=self.precision, is_packed=True)
        kernels = {"attention": attention, "cross_entropy": cross_entropy.version_on(self.device)}
        first = {"step": 0, "precision": resolve_precision(self.precision, self.device), "kernels": kernels}
        evaluated = self._evaluate([member for member in members if not member.starts_at_base])
        for member in members:
            if member.starts_at_base:
                if id(member.validation) not in self._base_losses:
                    self._base_losses[id(member.validation)] = self._evaluate([member])[member.name]
                evaluated[member.name] = self._base_losses[id(member.validation)]
            member.has_begun = True
        return {member.name: {**first, **evaluated[member.name]} for member in members}

    def _held_out(self, batches: Sequence[Batch]) -> Sequence[Piece]:
        if id(batches) not in self._pieces:
            pieces = [piece for batch in batches for piece in pieces_of(batch, most_tokens=self.pass_tokens)]
            self._pieces[id(batches)] = (batches, pieces)  # kept with the batches, whose id another could have then
        return self._pieces[id(batches)][1]

    def step(self, members: Sequence[Member]) -> dict[str, Metrics | Exception]:
        """One step of each of these; returns the metrics of `loop.run` by name, or what ended a run.

        A loss that is not finite ends its own run; no other sees it.
        """
        started = time.perf_counter()
        works, batches = [], {}
        for member in members:
            batches[member.name] = batch = next(member.batches)
            pieces = pieces_of(batch, most_tokens=self.pass_tokens)
            works.append(_Work(member, pieces, scale=1 / max(1, batch.loss_tokens)))
        for rows in self._passes(works):
            self._backward(rows)
        results: dict[str, Metrics | Exception] = {work.member.name: self._update(work) for work in works}
        elapsed = time.perf_counter() - started
        all_tokens = sum(work.num_tokens for work in works)
        for work in works:
            metrics = results[work.member.name]
            if isinstance(metrics, dict):
                share = work.num_tokens / max(1, all_tokens)
                metrics |= {"tokens": batches[work.member.name].num_tokens, "step_s": elapsed * share}
        due = [
            work.member
            for work in works
            if isinstance(results[work.member.name], dict)
            and work.member.plan.is_due(work.member.step, work.member.plan.eval_every)
        ]
        for name, found in self._evaluate(due).items():
            results[name] |= found  # type: ignore[operator]
        return results

    def _update(self, work: _Work) -> Metrics | Exception:
        """The step itself, its gradients being there."""
        member, plan = work.member, work.member.plan
        step = member.step + 1
        now = plan.at(step).optimizer
        rate = learning_rate(step - 1, now, total_steps=plan.total_steps)
        try:
            check_finite(work.nll, "loss", step)
            gradient_norm = member.optimizer.step(rate, weight_decay=now.weight_decay)
            check_finite(gradient_norm, "gradient's norm", step)
        except FloatingPointError as error:
            return error
        member.step = step
        loss = work.nll / max(1, work.num_labels)
        return {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": gradient_norm}

    def _evaluate(self, members: Sequence[Member]) -> dict[str, Metrics]:
        """Their held-out losses, all in the same passes."""
        works = [_Work(member, member.validation) for member in members]
        with torch.no_grad():
            for member in members:
                member.model.eval()
            for rows in self._passes(works):
                for work, nll in zip((work for work, _ in rows), self._forward(rows), strict=True):
                    work.nll += nll.item()
            for member in members:
                member.model.train()
        return {work.member.name: held_out_metrics(work.nll, work.num_labels) for work in works}

    def _passes(self, works: Sequence[_Work]) -> Iterator[_Rows]:
        """All rows of `works`, in passes."""
        rows: _Rows = []
        num_tokens = 0
        for work, piece in [(of_member, piece) for of_member in works for piece in of_member.pieces]:
            if rows and num_tokens + piece.num_tokens > self.pass_tokens:
                yield rows
                rows, num_tokens = [], 0
            if not rows or rows[-1][0] is not work:
                rows.append((work, []))
            rows[-1][1].append(piece)
            num_tokens += piece.num_tokens
        if rows:
            yield rows

    def _backward(self, rows: _Rows) -> None:
        """Add to each member's gradients and to its loss what these rows bring."""
        nlls = self._forward(rows)
        torch.stack([nll * work.scale for (work, _), nll in zip(rows, nlls, strict=True)]).sum().backward()
        for (work, _), nll in zip(rows, nlls, strict=True):
            work.nll += nll.item()

    def _forward(self, rows: _Rows) -> list[Tensor]:
        """For each member in `rows`, its sum of -log p in nats."""
        counts = [sum(piece.num_tokens for piece in pieces) for _, pieces in rows]
        for name, site in self._sites.items():
            site.parts = [(count, work.member.layers.get(name)) for count, (work, _) in zip(counts, rows, strict=True)]
        ids = torch.cat([piece.ids for _, pieces in rows for piece in pieces]).to(self.device)
        positions = torch.cat(
            [piece.positions + work.member.prefix_length for work, pieces in rows for piece in pieces]
        ).to(self.device)
        weight = self.base.token_embedding.weight
        with autocast(self.device, self.precision):
            context = _PackAttention(rows, device=self.device)
            hidden = self._decoder(ids.unsqueeze(0), positions=positions.unsqueeze(0), cache=context)[0]
            return [
                fused_cross_entropy(*_labelled(own, pieces, weight), smoothing=self._smoothing(work))
                for own, (work, pieces) in zip(hidden.split(counts), rows, strict=True)
            ]

    def _smoothing(self, work: _Work) -> float:
        if not torch.is_grad_enabled():
            return 0.0
        return work.member.plan.at(work.member.step + 1).label_smoothing


class _PackAttention:
    """The decoder's `Context` for tokens end to end: each member's attend by themselves, behind its own prefix.

    Not all in one call: a kernel may multiply neighbouring documents as one and leave out what lies between them, and
    zero times the NaN of a run that diverges is NaN in the next.
    """

    def __init__(self, rows: _Rows, *, device: torch.device) -> None:
        self._counts, self._contexts = [], []
        for work, pieces in rows:
            lengths = [length for piece in pieces for length in piece.lengths]
            documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
            model = work.member.model
            prefix = None if model.prefix is None else model.prefix(model)
            self._counts.append(sum(lengths))
            self._contexts.append(RowAttention(documents.unsqueeze(0), prefix=prefix, lengths=lengths))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(tensor.split(self._counts, dim=2) for tensor in (q, k, v)), strict=True)
        return torch.cat(
            [context.attend(layer, *part) for context, part in zip(self._contexts, parts, strict=True)], dim=2
        )


def _labelled(hidden: Tensor, pieces: Sequence[Piece], weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of `hidden` [time, width] that predict labels, the head's weight, and those labels."""
    starts = itertools.accumulate((piece.num_tokens for piece in pieces[:-1]), initial=0)
    places = torch.cat([piece.predicting + start for piece, start in zip(pieces, starts, strict=True)])
    labels = torch.cat([piece.labels for piece in pieces])
    return hidden[places.to(hidden.device)], weight, labels.to(hidden.device)


def _is_own(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear | QuantizedLinear)
