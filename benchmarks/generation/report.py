"""Ratios and bars from the runs, as numbers, a table and a plot."""

from pathlib import Path
from statistics import median
from typing import Any

BARS = [
    # workload, ours, the peer's, how many times faster
    ("W2", "pacos_bf16", "vllm_bf16", 1.25),
    ("W3", "pacos_bf16", "vllm_bf16", 1.25),
    ("W2", "pacos_int8", "vllm_bf16", 2.0),
    ("W3", "pacos_int8", "vllm_bf16", 2.0),
    ("W2", "pacos_int8", "vllm_int8", 1.0),
    ("W3", "pacos_int8", "vllm_int8", 1.0),
    ("W2", "pacos_int8", "ctranslate2_int8", 4.0),
    ("W3", "pacos_int8", "ctranslate2_int8", 4.0),
    ("W2", "pacos_int8", "transformers_fp32", 10.0),
    ("W3", "pacos_int8", "transformers_fp32", 10.0),
    ("W2", "pacos_int8", "transformers_bf16", 10.0),
    ("W3", "pacos_int8", "transformers_bf16", 10.0),
    ("W1", "pacos_fp32", "ctranslate2_fp32", 1.0),
    ("W1", "pacos_bf16", "vllm_bf16", 1.0),
    ("W1", "pacos_int8", "ctranslate2_int8", 1.0),
    ("W1", "pacos_int8", "vllm_int8", 1.0),
    ("W1", "pacos_bf16", "llamacpp_f16", 1.0),
    ("W1", "pacos_int8", "llamacpp_q8", 1.0),
    ("W1", "pacos_nf4", "llamacpp_q4", 1.0),
    ("W2", "pacos_fp32_32_loras", "pacos_fp32", 0.6),
    ("W2", "pacos_bf16_32_loras", "pacos_bf16", 0.6),
    ("W2", "pacos_int8_32_loras", "pacos_int8", 0.6),
]


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """`report` with the median rate of each contender, and which bars are reached: by the median of the ratios of runs
    in the same turn, because a machine may be twice as fast in one turn as in another."""
    rates: dict[str, dict[str, list[float | None]]] = {}
    for load, contenders in report["runs"].items():
        for name, runs in contenders.items():
            of_turns = [None if "failed" in run else run["tokens"] / run["seconds"] for run in runs]
            if any(of_turns):
                rates.setdefault(load, {})[name] = of_turns
    bars = []
    for load, ours, peer, bar in BARS:
        there = rates.get(load, {})
        ratios = [mine / theirs for mine, theirs in zip(there.get(ours, []), there.get(peer, []), strict=False)
                  if mine and theirs]  # fmt: skip
        if ratios:
            measured = round(median(ratios), 2)
            turns = [round(ratio, 2) for ratio in ratios]
            bars.append({"workload": load, "ours": ours, "peer": peer, "bar": bar, "measured": measured,
                         "turns": turns, "reached": measured >= bar})  # fmt: skip
    medians = {
        load: {name: round(median(rate for rate in of_turns if rate), 1) for name, of_turns in there.items()}
        for load, there in rates.items()
    }
    return report | {"tokens_per_s": medians, "bars": bars, "fp32_first_tokens_agree": _agree(report)}


def _agree(report: dict[str, Any]) -> dict[str, float]:
    """The share of answers in which each contender's first token is that of `pacos_fp32`, on the same requests."""
    shares = {}
    for load, contenders in report["runs"].items():
        ours = next((run for run in contenders.get("pacos_fp32", []) if "failed" not in run), None)
        for name, runs in contenders.items():
            run = next((run for run in runs if "failed" not in run), None)
            if ours and run:
                same = sum(a == b for a, b in zip(ours["first_tokens"], run["first_tokens"], strict=True))
                shares[f"{load} {name}"] = round(same / len(run["first_tokens"]), 3)
    return shares


def table(report: dict[str, Any]) -> str:
    loads = list(report["tokens_per_s"])
    names = list(dict.fromkeys(name for load in loads for name in report["tokens_per_s"][load]))
    lines = [f"| tokens/s | {' | '.join(loads)} |", f"|---|{'---|' * len(loads)}"]
    for name in names:
        rates = (report["tokens_per_s"][load].get(name) for load in loads)
        lines.append(f"| {name} | {' | '.join('–' if rate is None else f'{rate:.0f}' for rate in rates)} |")
    for bar in report["bars"]:
        reached = "reached" if bar["reached"] else "NOT reached"
        lines.append(
            f"{reached}: {bar['workload']}: {bar['ours']} is {bar['measured']} times {bar['peer']} ({bar['bar']})"
        )
    return "\n".join(lines)


def plot(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = report["tokens_per_s"]
    figure, axes = plt.subplots(1, len(rates), figsize=(4.2 * len(rates), 4), squeeze=False)
    for axis, (load, of_load) in zip(axes[0], rates.items(), strict=True):
        names = sorted(of_load, key=lambda name: of_load[name])
        colors = ["#2a6f97" if name.startswith("pacos") else "#b0b0b0" for name in names]
        bars = axis.barh(names, [of_load[name] for name in names], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set(title=load, xlabel="tokens/s", xlim=(0, 1.15 * max(of_load.values())))
        axis.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    figure.suptitle(f"GPT-2 124M, greedy · {machine['processor']}, {machine['cores']} cores", fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
