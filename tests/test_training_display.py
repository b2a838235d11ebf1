"""What training shows, on a terminal of 80 columns and where none is."""

import io
from typing import Any

import pytest
from rich.console import Console

from app import console
from app.display.training import training_progress

TOTAL = 12_000


def step(number: int) -> dict[str, Any]:
    return {"step": number, "loss": 12.345, "learning_rate": 1.5e-3, "tokens": 900.0, "step_s": 0.25}


def shown(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> str:
    stream = io.StringIO()
    replaced = Console(file=stream, width=80, force_terminal=is_terminal, color_system=None, highlight=False)
    monkeypatch.setattr(console, "console", replaced)
    with training_progress("pretrain", TOTAL) as show:
        show({"step": 0, "precision": "fp32", "kernels": {"attention": "flash"}, "eval_loss": 3.0, "perplexity": 20.0})
        for number in range(5000, 10_001, 1000):
            show(step(number))
    return stream.getvalue()


def test_the_bar_shows_loss_rate_and_time_left_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, is_terminal=True)
    last = [line for line in text.replace("\r", "\n").splitlines() if "10000/12000" in line][-1]
    for part in ("loss 12.345", "lr 1.5e-03", "3.6k tok/s", "left"):
        assert part in last, last
    assert "…" not in last


def test_without_a_terminal_a_line_at_every_tenth_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, is_terminal=False).splitlines()
    bars = [line for line in lines if line.startswith("pretrain:")]
    assert len(bars) == 6, bars
    assert bars[-1].startswith("pretrain: 10,000/12,000 steps  loss 12.345  lr 1.5e-03  3.6k tok/s")
    assert any("held-out loss 3.000" in line for line in lines)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_path_longer_than_80_columns_is_shown_whole(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    stream = io.StringIO()
    replaced = Console(file=stream, width=80, force_terminal=is_terminal, color_system=None, highlight=False)
    monkeypatch.setattr(console, "console", replaced)
    path = "/srv/" + "a-long-name/" * 8 + "report.html"
    console.table("Trained", {"training loss": "3.278 → 1.300", "report": path, "delta": None})
    title, loss, *rest = stream.getvalue().splitlines()
    assert (title, loss.rstrip()) == ("Trained", "  training loss    3.278 → 1.300")
    assert rest[0].startswith("  report           /srv/")
    assert "".join(line[19:].rstrip() for line in rest) == path
    assert len(rest) == 1 or is_terminal, "a file has lines of any length"


def test_without_a_terminal_what_is_said_stays_on_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=stream, width=80, force_terminal=False))
    console.say("Report: /srv/" + "a long name/" * 8 + "report.html")
    assert len(stream.getvalue().splitlines()) == 1
