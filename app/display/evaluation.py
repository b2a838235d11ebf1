"""What a job found, as tables in the terminal. Knows results and `console`, no Ray and no job's inside."""

from collections.abc import Sequence
from typing import Any

from app import console
from app.config import EvaluateConfig


def show_evaluations(config: EvaluateConfig, results: Sequence[Any]) -> None:
    """One model's figures and samples, or several models' side by side."""
    if len(results) > 1:
        _show_comparison(config, results)
    else:
        _show_evaluation(config, results[0])
    for result in results:
        if len(results) > 1 and result.samples:
            console.heading(f"Answers of {result.name}")
        for sample in result.samples:
            console.say(f"\n{sample.prompt}", style="dim")
            console.say(f"answer:    {sample.answer}")
            console.say(f"reference: {sample.reference}", style="dim")


def _show_evaluation(config: EvaluateConfig, result: Any) -> None:
    console.table(
        f"{config.model}{' + ' + result.delta if result.delta else ''} on {config.data} ({config.split})",
        {
            "records": result.records,
            "response tokens": result.tokens,
            "loss (nats per token)": result.loss,
            "perplexity": result.perplexity,
            "bits per byte": result.bits_per_byte,
            f"ROUGE-L of {result.answers} answers": result.rouge_l,
            "exact matches among them": None if result.exact_match is None else f"{result.exact_match:.1%}",
        },
    )


def _show_comparison(config: EvaluateConfig, results: Sequence[Any]) -> None:
    first = results[0]
    rows = [
        (
            result.name,
            result.method or "",
            f"{result.trained_parameters:,}" if result.method else "",
            f"{result.loss:.4f}",
            f"{result.perplexity:,.3f}",
            f"{result.bits_per_byte:.4f}",
            *([f"{result.rouge_l:.3f}", f"{result.exact_match:.1%}"] if result.answers else []),
        )
        for result in results
    ]
    header = ("", "method", "weights", "loss", "perplexity", "bits/byte", "ROUGE-L", "exact match")
    console.grid(
        f"{config.data} ({config.split}): {first.records:,} records, {first.tokens:,} response tokens"
        + (f"; {first.answers} answers" if first.answers else ""),
        header[: len(rows[0])],
        rows,
        right=range(2, len(rows[0])),
        last=False,
    )
