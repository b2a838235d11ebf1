import torch

from app.models.checkpoints import load_decoder


def test_padding_on_the_right_changes_no_real_position(tiny_model) -> None:
    model = load_decoder(tiny_model)
    short = torch.randint(0, 400, (1, 10), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([short, torch.zeros(1, 7, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded)[:, :10], model(short), atol=1e-5, rtol=1e-5)


def test_a_token_does_not_see_those_after_it(tiny_model) -> None:
    model = load_decoder(tiny_model)
    ids = torch.randint(0, 400, (1, 12), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 400
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_head_and_embedding_are_one_weight(tiny_model) -> None:
    model = load_decoder(tiny_model)
    assert [name for name, _ in model.named_parameters() if "head" in name] == []
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(model.head(hidden), hidden @ model.token_embedding.weight.T)
