"""`pacos inspect`: what prepared data looks like. Reads shards and counts; draws nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow.parquet as pq

from app.assets import model_folder
from app.config.data import InspectConfig
from app.data.shards import ROW_SCHEMA, Manifest, read_manifest
from app.data.tokenization import Tokenizer, load_tokenizer
from app.errors import UserError

_BINS = 12


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens that are all in the loss, or all out of it."""

    text: str
    in_loss: bool


@dataclass(frozen=True)
class Sample:
    parts: list[Part]
    num_tokens: int
    loss_tokens: int
    round_trips: bool
    """Whether encoding each part's text again gives its ids."""


@dataclass(frozen=True)
class Inspection:
    manifest: Manifest
    split: str
    samples: list[Sample]
    lengths: np.ndarray
    """int32 [documents]"""
    loss_lengths: np.ndarray
    """int32 [documents]: how many of the document's tokens are in the loss."""
    row_lengths: np.ndarray
    """int32 [rows]"""

    @property
    def row_capacity(self) -> int | None:
        """Tokens of a full row, where the layout says: of packed and of fixed rows."""
        layout = self.manifest.values["config"]["layout"]
        return layout.get("length") if self.split == "train" else None

    @property
    def fill(self) -> float:
        """Share of tokens that are not padding: of full rows, or of batches of 16 in the stored order."""
        if self.row_capacity:
            return float(self.row_lengths.sum() / (len(self.row_lengths) * self.row_capacity))
        batches = [self.row_lengths[start : start + 16] for start in range(0, len(self.row_lengths), 16)]
        return float(self.row_lengths.sum() / sum(batch.max() * len(batch) for batch in batches))

    @property
    def loss_share(self) -> float:
        return float(self.loss_lengths.sum() / self.lengths.sum())

    def length_bars(self) -> list[tuple[str, int]]:
        edges = np.unique(np.linspace(0, self.lengths.max(), _BINS + 1).round().astype(int))
        counts, _ = np.histogram(self.lengths, bins=edges + 1)  # a bar holds its upper edge
        return [(f"{a + 1}–{b}", int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]

    def figures(self) -> dict[str, object]:
        median, p95 = np.percentile(self.lengths, [50, 95])
        filled = "filled of each row" if self.row_capacity else "filled of a batch of 16, padded to its longest"
        return {
            "split": self.split,
            "records": len(self.lengths),
            "rows": len(self.row_lengths),
            "tokens": int(self.lengths.sum()),
            "tokens a record": f"median {median:.0f}, 95 % below {p95:.0f}, longest {self.lengths.max()}",
            "in the loss": f"{self.loss_share:.1%}",
            filled: f"{self.fill:.1%}",
        }


def inspect(config: InspectConfig) -> Inspection:
    """Read a split's shards, one at a time.

    Raises:
        UserError: the folder is not of prepared data, the split is empty, or the tokenizer has changed since.
    """
    manifest = read_manifest(config.data)
    if not manifest.num_rows(config.split):
        raise UserError(f"data={config.data!r} has no {config.split} records")
    model = manifest.values["config"]["model"]
    tokenizer = load_tokenizer(model_folder(model))
    if tokenizer.fingerprint() != manifest.values["tokenizer_hash"]:
        raise UserError(f"data={config.data!r}: the tokenizer of model={model!r} is not the one it was prepared with")
    wanted = _drawn(manifest.num_records(config.split), config.samples, seed=config.seed)
    lengths, losses, rows, samples = [], [], [], []
    seen = 0
    for file in manifest.files(config.split):
        table = pq.read_table(file, schema=ROW_SCHEMA)
        ids, mask, of_documents = (table[name].combine_chunks() for name in ROW_SCHEMA.names)
        documents = of_documents.flatten().to_numpy()
        flat_ids, flat_mask = ids.flatten().to_numpy(), mask.flatten().to_numpy(zero_copy_only=False)
        starts = np.cumsum(documents) - documents
        lengths.append(documents)
        losses.append(np.add.reduceat(flat_mask.astype(np.int32), starts) if len(starts) else documents)
        rows.append(ids.value_lengths().to_numpy(zero_copy_only=False))
        for place in (index - seen for index in wanted if seen <= index < seen + len(documents)):
            span = slice(starts[place], starts[place] + documents[place])
            samples.append(_sample(flat_ids[span].tolist(), flat_mask[span].tolist(), tokenizer))
        seen += len(documents)
    return Inspection(
        manifest, config.split, samples, np.concatenate(lengths), np.concatenate(losses), np.concatenate(rows)
    )


def _drawn(total: int, count: int, *, seed: int) -> list[int]:
    return sorted(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False).tolist())


def _sample(ids: Sequence[int], mask: Sequence[bool], tokenizer: Tokenizer) -> Sample:
    parts, round_trips = [], True
    pairs = zip(mask, ids, strict=True)
    for in_loss, group in groupby(pairs, key=lambda pair: pair[0]):
        of_part = [token for _, token in group]
        text = tokenizer.decode(of_part, keep_special=True)
        round_trips &= tokenizer.encode(text) == of_part
        parts.append(Part(text, in_loss))
    return Sample(parts, len(ids), sum(mask), round_trips)
