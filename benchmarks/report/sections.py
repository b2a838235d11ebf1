"""One function a result file: what it holds, as tables. Knows the files' keys; a file without a function is shown by
`any_result`, so that none is left out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.report.tables import gib, mib, milliseconds, number, percent, ratio, table

Result = dict[str, Any]


@dataclass(frozen=True)
class Section:
    title: str
    render: Callable[[Result], str]
    """The tables of a result, without its machine."""
    explained_in: str
    """The document, below docs/, that says what the figures mean."""
    plots: tuple[str, ...] = ()
    """As seen from benchmarks/."""
    module: str = ""
    """What measures it, where that is not named as the result is, or as its name begins before a dash."""


PEERS_OF = {"pacos_bf16": ("vllm_bf16",),
            "pacos_int8": ("vllm_int8", "ctranslate2_int8", "vllm_bf16", "transformers_bf16"),
            "pacos_fp32": ("ctranslate2_fp32", "transformers_fp32")}  # fmt: skip
"""Which ratios the report gives beside those that have a bar."""


def generation(result: Result) -> str:
    rates = result["tokens_per_s"]
    loads = list(rates)
    names = list(dict.fromkeys(name for load in loads for name in rates[load]))
    # with LoRAs it is another model that answers
    agree = {key: share for key, share in result.get("fp32_first_tokens_agree", {}).items() if "_loras" not in key}
    speed = table(
        ["new tokens/s", *loads, "W2's answers that begin as fp32's"],
        ([name, *(rates[load].get(name) for load in loads), _share(agree.get(f"W2 {name}"))] for name in names),
    )
    ratios = table(
        ["by these medians", *loads],
        (
            [f"{ours} to {peer}", *(ratio(rates[load].get(ours), rates[load].get(peer)) for load in loads)]
            for ours, peers in PEERS_OF.items()
            for peer in peers
        ),
    )
    what = (
        "GPT-2 124M, greedy, end tokens ignored. W1 is one request of 64 prompt and 128 new tokens; W2 is 64 requests "
        "at once, of 16 to 128 prompt and new tokens; W3 is 500 of them."
    )
    return f"{what}\n\n{speed}\n\n{ratios}"


def training(result: Result) -> str:
    contenders = result["contenders"]
    ours = contenders.get("pacos_process", {})
    rows = (
        [
            name,
            run["tokens_per_s"],
            ratio(ours.get("tokens_per_s"), run["tokens_per_s"]),
            percent(run["mfu"]),
            gib(run["peak_bytes"]),
            ratio(run["peak_bytes"], ours.get("peak_bytes")),
            run["computed_in"],
            f"{run['first_loss']:.3f} → {run['loss_after_a_pass']:.3f}",
        ]
        for name, run in contenders.items()
    )
    head = ["", "tokens/s without padding", "pacos_process is", "of the machine's best product", "peak memory",
            "times pacos_process", "computed in", "loss, first → after a pass"]  # fmt: skip
    fewer = [name for name, run in contenders.items() if run.get("threads", result["threads"]) < result["threads"]]
    spare = f"; one less, for a core to spare: {', '.join(fewer)}" if fewer else ""
    return f"LoRA (r=8, all layers) of GPT-2 124M, {result['threads']} threads{spare}.\n\n{table(head, rows)}"


def data(result: Result) -> str:
    rates, over, whole = result["records_per_s"], result["pacos_over"], result.get("pacos_over_whole_call", {})
    rows = ([name, rate, _times(over.get(name)), _times(whole.get(name))] for name, rate in rates.items())
    head = ["", "records/s", "pacos is, start-up set aside", "the call as a whole, Ray's start set aside"]
    memory = result["memory"]
    return (
        f"{result['records']:,} Alpaca records to token rows. `pacos` goes from the file to packed shards, `bare` is "
        f"the tokenizer alone, a process a core.\n\n{table(head, rows)}\n\n"
        f"{memory['source_records']:,} records: {memory['records_per_s']:,} records/s, peak {memory['peak_gib']} GiB "
        f"over all processes, of which {memory['before_gib']} were there before."
    )


def serving(result: Result) -> str:
    parts = result["parts"]
    engine = parts.get("engine", {}).get("tokens_per_s")
    rows = (
        [
            name,
            part.get("requests"),
            part["tokens_per_s"],
            ratio(part["tokens_per_s"], engine),
            *(
                milliseconds(_of(part, kind, share))
                for kind in ("first_token_s", "request_s")
                for share in ("p50", "p99")
            ),
            ", ".join(f"{count:,} {outcome}" for outcome, count in part.get("outcomes", {}).items()) or None,
        ]
        for name, part in parts.items()
        if "tokens_per_s" in part
    )
    head = ["", "requests", "tokens/s", "over the bare engine", "first token, median", "99 %", "whole answer, median",
            "99 %", "outcomes"]  # fmt: skip
    return (
        f"Model `{result['model']}`, {result['clients']} streaming clients, {result['tokens']} tokens an answer. "
        "`engine` has no server; `plain` is FastAPI with `transformers`; `cached` answers from the cache at 50 "
        f"requests/s; `overload` asks four times as often as is answered.\n\n{table(head, rows)}"
    )


def sweeps(result: Result) -> str:
    alone, packed, beside = result["one_after_another"], result["packed"], result["two_side_by_side"]
    runs = len(result["ranks"])
    rows = [
        [
            f"{runs} runs, one after another",
            alone["wall_s"],
            alone["cpu_s"],
            alone["steps_s"],
            gib(alone["peak_bytes"]),
        ],
        [f"the same {runs} packed", packed["wall_s"], packed["cpu_s"], packed["steps_s"], gib(packed["peak_bytes"])],
        ["two side by side, a thread each", beside["wall_s"], None, None, gib(beside["peak_bytes"])],
    ]
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items() if value != "")
    return (
        f"LoRA runs of ranks {', '.join(map(str, result['ranks']))}: {settings}.\n\n"
        f"{table(['', 'seconds', 'seconds of processor', 'of them steps', 'peak memory'], rows)}\n\n"
        f"Trials an hour, packed over alone: {number(result['trials_an_hour_packed_over_alone'])} times. Memory, "
        f"packed over two side by side: {number(result['memory_packed_over_two'])} times. The largest difference of a "
        f"loss: {result['largest_difference_of_a_loss']:.1e}."
    )


def scale(result: Result) -> str:
    return "Simulated from measured times, with tables for each question; nothing of it is side by side with others."


def kv_cache(result: Result) -> str:
    runs = {(run["precision"], run["batch"], run["cache"]): run["tokens_per_s"] for run in result["runs"]}
    rows = []
    for precision, batch in dict.fromkeys((precision, batch) for precision, batch, _ in runs):
        cached, bare = (runs.get((precision, batch, which)) for which in ("with cache", "without cache"))
        rows.append([f"{precision}, {batch} at once", cached, bare, ratio(cached, bare)])
    return f"GPT-2 124M, {result['prompt']} prompt and {result['new']} new tokens, tokens/s.\n\n" + table(
        ["", "with cache", "without", "ratio"], rows
    )


def attention(result: Result) -> str:
    timed = {(run["length"], run["backend"], run["packed"]): run for run in result["results"] if "seconds" in run}
    columns = list(dict.fromkeys((backend, packed) for _, backend, packed in timed))
    head = ["tokens in the row", *(f"{backend}{', packed' if packed else ''}" for backend, packed in columns)]
    rows = (
        [length, *(_time_and_memory(timed.get((length, *column))) for column in columns)]
        for length in dict.fromkeys(length for length, _, _ in timed)
    )
    absent = sorted({run["backend"] for run in result["results"]} - {backend for backend, _ in columns})
    cannot = f"\n\nCannot train on this device: {', '.join(absent)}." if absent else ""
    return (
        f"One layer of GPT-2 small's shape, forward and backward, on {result['device']}.\n\n{table(head, rows)}{cannot}"
    )


def kernels(result: Result) -> str:
    shown = {name: of for name, of in result["ratios"].items() if not isinstance(result.get(name), str)}
    rows = ([name, of["seconds"], of["cpu_s"], of["peak_mib"]] for name, of in shown.items())
    notes = "".join(f"\n\n`{name}` here is {result[name]}." for name in result["ratios"] if name not in shown)
    return f"Ours over torch's, medians; below 1 is better.\n\n{table(['', 'time', 'CPU time', 'memory'], rows)}{notes}"


def retrieval(result: Result) -> str:
    settings = result["settings"]
    rows = (
        [
            f"{run['kind']}, {mib(run['bytes'])}, built in {number(run['build_s'])} s",
            search["top_k"],
            search["effort"] or None,
            search["recall"],
            search["questions_per_s"],
            search["all_at_once_per_s"],
        ]
        for run in result["runs"]
        for search in run["searches"]
    )
    head = ["", "places", "effort", "recall", "questions/s, one at a time", "all at once"]
    return f"{settings['vectors']:,} vectors of {settings['width']} dimensions.\n\n{table(head, rows)}"


def semantic_cache(result: Result) -> str:
    lists = {"adversarial": "that look alike and differ", "paraphrases": "true paraphrases"}
    ways = ("gate", "embedder", "both")
    rows = (
        [f"{result[name]['gate']['of']} {what}", *(result[name][way]["found"] for way in ways)]
        for name, what in lists.items()
    )
    return table(["pairs answered alike", "the rules", "the embedder alone", "both"], rows)


def techniques(result: Result) -> str:
    rows = (
        [
            entry["name"],
            entry["trained"],
            entry["step_s"],
            gib(entry["peak_bytes"]),
            f"{entry['perplexity_before']:.2f} → {entry['perplexity']:.2f}",
            f"{entry['delta_bytes'] / 1e6:.2f} MB",
        ]
        for entry in result["entries"]
    )
    head = ["", "trained weights", "s/step", "peak memory", "held-out perplexity", "delta"]
    what = f"{result['steps']} steps of {result['records_per_step']} Alpaca records over the embedded base"
    return f"{what}, {result['threads']} threads.\n\n{table(head, rows)}{_note(result)}"


def pretraining(result: Result) -> str:
    rows = (
        [name, run["weights"], run["tokens"], run["bits_per_byte"], run["train_bits_per_byte"]]
        for name, run in result["candidates"].items()
    )
    head = ["layers × width, vocabulary", "weights", "tokens seen", "held-out bits per byte", "in training, at the end"]
    where = f"From scratch on {result['device']}, {result['at_once']} at once, {result['seconds']} s each."
    return f"{where}\n\n{table(head, rows)}"


def gpu_generation(result: Result) -> str:
    runs = result["results"]
    peer = runs.get("transformers, static cache, compiled", {})
    rows = []
    for name, run in runs.items():
        figures: list[Any] = []
        for batch in ("batch 1", "batch 256"):
            step_s = run.get(batch, {}).get("step_s")
            figures += [milliseconds(step_s), ratio(peer.get(batch, {}).get("step_s"), step_s)]
        of_limit, many = _share(run.get("batch 1", {}).get("of_limit")), run.get("batch 256", {})
        rows.append([name, *figures, of_limit, many.get("tokens_per_s"), run.get("W2", {}).get("tokens_per_s")])
    head = ["", "a step at batch 1", "speed over transformers' static cache", "a step at batch 256",
            "speed over transformers'", "of the memory's limit at batch 1", "tokens/s at batch 256",
            "W2, tokens/s"]  # fmt: skip
    return (
        f"GPT-2 124M with random weights on one {result['device']}, whose copies move "
        f"{result['bandwidth'] / 1e12:.2f} TB/s.\n\n{table(head, rows)}{_note(result)}"
    )


def gpu_training(result: Result) -> str:
    rows = (
        [name, run["tokens_per_s"], milliseconds(run["step_s"]), percent(run["mfu"]), gib(run["peak_bytes"])]
        for name, run in result["runs"].items()
    )
    head = ["", "tokens/s", "a step", "of its best product", "peak memory"]
    return f"GPT-2 124M, rows of 1,024 tokens, on one {result['device']}.\n\n{table(head, rows)}"


def engine_soak(result: Result) -> str:
    counts = ", ".join(f"{count:,} {what}" for what, count in result["counts"].items())
    growth = percent(result["memory_growth_after_the_first_quarter"])
    verdict = "passed" if result["passed"] else "**not passed**"
    return (
        f"{result['minutes']:.0f} minutes of arrivals, aborts and loads: {counts}; {result['stats']['preemptions']:,} "
        f"times one gave way to another. Memory grew by {growth} after the first quarter. Its own test: {verdict}."
    )


def soak(result: Result) -> str:
    met, latencies = result["met"], result["latencies_s"]
    rows = (
        [
            kind,
            ", ".join(f"{count:,} × {status}" for status, count in met[kind].items()),
            *(" → ".join(number(1000 * third) for third in latencies[kind][part]) for part in latencies[kind]),
        ]
        for kind in met
    )
    grown = ", ".join(f"{process} by {percent(share)}" for process, share in result["grown"].items())
    return (
        f"{result['minutes']:.0f} minutes, {result['promotions']} promotions and {result['training_steps']:,} training "
        f"steps beside the requests. Milliseconds are those of each third after the first quarter.\n\n"
        f"{table(['', 'answered', 'median', '95th percentile'], rows)}\n\n"
        f"Of {result['processes']} processes, grown by more than 5 %: {grown or 'none'}."
    )


def any_result(result: Result) -> str:
    """Every number and text of a result that nobody has described here, by its path, without lists of single runs."""
    rows = [[path, value] for path, value in _leaves(result) if not path.startswith(("machine", "bars"))]
    return table(["", "figure"], rows)


SECTIONS = {
    "generation": Section(
        "Generation beside vLLM, CTranslate2 and transformers",
        generation,
        "engine.md#speed-on-a-cpu",
        ("results/generation.png",),
    ),
    "training": Section(
        "Training beside Hugging Face's Trainer and PEFT", training, "training.md", ("../docs/images/training.png",)
    ),
    "data": Section("Preparing data beside datasets.map", data, "data.md#how-fast"),
    "serving": Section("Serving beside FastAPI and transformers", serving, "serving.md#under-load"),
    "sweeps": Section("A sweep's trials, packed and one after another", sweeps, "sweeps.md"),
    "sweeps-gpt2": Section(
        "The same over GPT-2 124M, with random weights", sweeps, "sweeps.md", module="benchmarks.sweeps"
    ),
    "scale": Section(
        "One replica to a thousand",
        scale,
        "scale.md",
        ("../docs/images/scale-sizes.png", "../docs/images/scale-load.png"),
    ),
    "scale-measured": Section(
        "What a request, a token and a document cost", any_result, "scale.md", module="benchmarks.scale.measure"
    ),
    "techniques": Section("Fourteen techniques", techniques, "techniques.md", ("../docs/images/techniques.png",)),
    "kv_cache": Section(
        "The engine with its cache and without",
        kv_cache,
        "engine.md#with-the-cache-and-without",
        ("results/kv_cache.png",),
    ),
    "kernels": Section("Kernels of our own beside torch's operations", kernels, "models.md#kernels"),
    "attention": Section("Attention by length", attention, "models.md#attention", ("../docs/images/attention.png",)),
    "retrieval": Section("A million vectors", retrieval, "retrieval.md#how-vectors-are-searched"),
    "semantic_cache": Section("The semantic cache", semantic_cache, "serving.md#the-same-question-in-other-words"),
    "pretraining": Section(
        "Shapes of the embedded base", pretraining, "embedded-base.md", ("../docs/images/base-shapes.png",)
    ),
    "gpu-generation": Section(
        "Generation on a GPU", gpu_generation, "engine.md#on-a-gpu", module="benchmarks.gpu.generation"
    ),
    "gpu-training": Section("Training on a GPU", gpu_training, "training.md", module="benchmarks.gpu.training"),
    "soak": Section("Everything at once on a cluster", soak, "chaos.md#soak", ("../docs/images/soak.png",)),
    "engine_soak": Section(
        "Twenty minutes of everything at once", engine_soak, "engine.md#twenty-minutes-of-everything-at-once"
    ),
}
"""By the result file's name, in the report's order."""


def _note(result: Result) -> str:
    """What whoever keeps an older result has written beside it."""
    return f"\n\nNote: {result['note']}." if "note" in result else ""


def _of(part: Result, kind: str, share: str) -> float | None:
    return (part.get(kind) or {}).get(share)


def _share(share: float | None) -> str | None:
    return None if share is None else percent(share)


def _times(times: float | None) -> str | None:
    return None if times is None else f"{number(times)} ×"


def _time_and_memory(run: Result | None) -> str | None:
    return None if run is None else f"{milliseconds(run['seconds'])}, {mib(run['peak_bytes'])}"


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{path}{'.' if path else ''}{key}")]
    return [] if isinstance(value, list) or value is None else [(path, value)]
