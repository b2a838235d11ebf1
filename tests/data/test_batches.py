from dataclasses import replace

import numpy as np
import pytest
import torch

from app.data.batches import collate, filled_length
from app.data.packing import pack
from app.models.decoder import Decoder, DecoderConfig
from app.training import loss
from app.training.loss import masked_nll

CONFIG = DecoderConfig(vocab_size=97, context_length=64, num_layers=3, num_heads=4, width=32, mlp_width=64)


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(CONFIG)
    model.initialize(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)  # attention that depends on what it sees
    return model


def records(count: int, *, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    made = []
    for length in random.integers(2, 60, size=count):
        prompt = random.integers(1, length)
        made.append((random.integers(0, 97, size=length), np.arange(length) >= prompt))
    return made


def packed(made: list[tuple[np.ndarray, np.ndarray]], *, capacity: int = 128):
    rows = pack([len(ids) for ids, _ in made], capacity=capacity)
    return collate(
        [np.concatenate([made[i][0] for i in row]) for row in rows],
        [np.concatenate([made[i][1] for i in row]) for row in rows],
        [np.array([len(made[i][0]) for i in row]) for row in rows],
    )


def test_padding_is_never_in_the_loss_but_the_end_of_text_is() -> None:
    end = 9
    batch = collate([np.array([1, 2, end]), np.array([3])], [np.array([False, True, True]), np.array([True])])
    assert batch.input_ids.tolist() == [[1, 2, end], [3, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True], [True, False, False]]
    assert batch.labels.tolist() == [[-100, 2, end], [3, -100, -100]]
    assert batch.num_tokens == 4


def test_rows_of_a_fixed_length_have_one_shape() -> None:
    batch = collate([np.array([1, 2])], [np.array([False, True])], [np.array([2])], pad_to=6)
    assert batch.input_ids.tolist() == [[1, 2, 0, 0, 0, 0]]
    assert batch.positions is None and batch.documents is None


def test_what_a_batch_is_split_into_lies_where_it_does() -> None:
    """A worker with fewer rows than micro-batches splits them on its GPU, and computes empty ones there too."""
    ids, mask = np.arange(5), np.ones(5, dtype=bool)
    meta = torch.device("meta")
    parts = collate([ids, ids[:3]], [mask, mask[:3]]).to(meta).split(3)
    assert [len(part.input_ids) for part in parts] == [1, 1, 1]
    assert {part.input_ids.device for part in parts} == {part.loss_mask.device for part in parts} == {meta}
    assert [part.loss_tokens for part in collate([ids, ids[:3]], [mask, mask[:3]]).split(3)] == [4, 2, 0]


def test_packed_rows_count_positions_in_each_document() -> None:
    ids, mask = np.arange(5), np.array([False, True, False, True, True])
    batch = collate([ids, ids[:3]], [mask, mask[:3]], [np.array([2, 3]), np.array([3])])
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 2, 2]]


def test_the_packed_loss_is_the_unpacked_one(model: Decoder) -> None:
    made = records(50)
    separate, count = masked_nll(model, collate([ids for ids, _ in made], [mask for _, mask in made]))
    together, packed_count = masked_nll(model, packed(made))
    assert packed_count == count
    torch.testing.assert_close(together, separate, rtol=1e-4, atol=0)


def test_end_to_end_nothing_is_left_but_what_a_label_needs() -> None:
    ids, mask = np.arange(1, 6), np.array([True, True, False, True, False])
    nothing = np.zeros(5, dtype=bool)
    batch = collate([ids, ids[:3], ids], [mask, mask[:3], nothing], [np.array([2, 3]), np.array([3]), np.array([5])])
    whole = batch.end_to_end()
    assert whole.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, *[0] * 26]]
    assert whole.positions.tolist() == [[0, 1, 0, 1, 0, 1, *[0] * 26]]
    first, second, third, filling = whole.documents[0, [0, 2, 4, 6]].tolist()
    assert len({first, second, third, filling}) == 4
    assert whole.documents.tolist() == [[first, first, second, second, third, third, *[filling] * 26]]
    assert whole.loss_mask.nonzero()[:, 1].tolist() == [1, 3, 5], "the first of a row is predicted by nothing"
    assert (whole.num_tokens, whole.loss_tokens) == (batch.num_tokens, batch.loss_tokens)
    again = collate([ids], [mask]).end_to_end(multiple=3)
    assert again.input_ids.tolist() == [[1, 2, 3, 4, 0, 0]] and again.positions.tolist() == [[0, 1, 2, 3, 0, 0]]
    assert (empty := collate([ids], [nothing])).end_to_end() is empty


def test_end_to_end_comes_in_few_lengths_and_is_hardly_filled() -> None:
    lengths = {count: filled_length(count) for count in range(1, 20_000)}
    assert all(count <= length <= max(count + 31, 1.0625 * count) for count, length in lengths.items())
    for power in (512, 1024, 8192):
        assert len({length for length in lengths.values() if power < length <= 2 * power}) == 16


def test_the_loss_end_to_end_is_that_of_padded_rows(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    made = records(30, seed=2)
    batches = [packed(made), collate([ids for ids, _ in made], [mask for _, mask in made])]
    end_to_end = [masked_nll(model, batch) for batch in batches]
    monkeypatch.setattr(loss, "is_computed_end_to_end", lambda attention, device: False)
    padded = [masked_nll(model, batch) for batch in batches]
    for (ours, count), (reference, reference_count) in zip(end_to_end, padded, strict=True):
        assert count == reference_count
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)


def test_neither_positions_nor_isolation_alone_would_do(model: Decoder) -> None:
    """The trap, sprung: without either the loss is another one, so the test above can fail."""
    batch = packed(records(50))
    right, _ = masked_nll(model, batch)
    running = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids) % CONFIG.context_length
    for trap in (replace(batch, documents=None), replace(batch, positions=running)):
        wrong, _ = masked_nll(model, trap)
        assert abs(wrong - right) > 1e-3 * right


def test_a_documents_hidden_states_do_not_depend_on_its_neighbours(model: Decoder) -> None:
    batch = packed(records(20))
    changed = batch.input_ids.clone()
    changed[batch.documents == 1] = 5
    with torch.no_grad():
        before = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
        after = model(changed, positions=batch.positions, documents=batch.documents)
    others = batch.documents != 1
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)


def test_packed_gradients_are_the_unpacked_ones(model: Decoder) -> None:
    made = records(30, seed=1)
    gradients = []
    for batch in (collate([ids for ids, _ in made], [mask for _, mask in made]), packed(made)):
        model.zero_grad()
        masked_nll(model, batch)[0].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
