"""The endpoint under load, beside the bare engine and beside FastAPI with `transformers`, in one run.

    python -m benchmarks.serving --prompts koala.jsonl vicuna.jsonl --json benchmarks/results/serving.json

With prompts of real users, `--tokens` to each, end tokens ignored, drawn at temperature 1 so that no cache helps:

* engine: all requests at once into `app/engine`, no server;
* pacos: `pacos serve`, `--clients` streaming clients, each with its next request when the last is answered;
* cached: one greedy request again and again, 50 a second, answered from the cache;
* overload: four times as many requests a second as `pacos` has just answered;
* plain: FastAPI and `transformers`, a few clients and requests, since it is slow.

Clients run on the same cores as the servers; what they take is part of the result. The file is written after each part.
"""

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from app.assets import model_folder
from app.atomic import write_text
from benchmarks.folder import kept_or_temporary
from benchmarks.machine import describe
from benchmarks.serving import servers
from benchmarks.serving.clients import closed_loop, figures, open_loop

CACHED_PER_S, CACHED_S = 50, 10
OVERLOAD, OVERLOAD_S = 4, 30
PLAIN_CLIENTS, PLAIN_REQUESTS = 8, 16
PARTS = ("engine", "pacos", "cached", "overload", "plain")


def main() -> None:
    arguments = parse()
    texts = [text for file in arguments.prompts for text in read_prompts(file)]
    report: dict[str, Any] = {
        "machine": describe("torch", "transformers", "ray", "fastapi"),
        "load_average_before": os.getloadavg()[0],
        "model": arguments.model,
        "proxy": arguments.proxy,
        "clients": arguments.clients,
        "requests": arguments.requests,
        "tokens": arguments.tokens,
        "parts": {},
    }

    def keep(name: str, result: dict[str, Any]) -> None:
        report["parts"][name] = result
        report["bars"] = bars(report["parts"])
        print(f"{name}: {json.dumps(result)}", flush=True)
        if arguments.json:
            write_text(arguments.json, json.dumps(report, indent=2) + "\n")

    folder = str(model_folder(arguments.model))
    bodies = [completion(texts[number % len(texts)], arguments) for number in range(arguments.requests)]
    with kept_or_temporary(arguments.folder) as place:
        if "engine" in arguments.parts:
            keep("engine", bare_engine(folder, bodies, arguments))
        if {"pacos", "cached", "overload"} & set(arguments.parts):
            options = {"threads": arguments.threads, "batch_size": arguments.batch_size, "log": place / "pacos.log"}
            with servers.pacos(arguments.model, **options, settings=[f"proxy={arguments.proxy}"]) as url:
                measure_pacos(url, bodies, arguments, keep)
        if "plain" in arguments.parts:
            with servers.fastapi_and_transformers(folder, threads=arguments.threads, log=place / "plain.log") as url:
                few = [{**plain_body(body), "stream": False} for body in bodies[:PLAIN_REQUESTS]]
                answers = asyncio.run(closed_loop(f"{url}/v1/completions", few, num_clients=PLAIN_CLIENTS))
                keep("plain", figures(answers))
    for bar in report["bars"]:
        print(f"{'reached' if bar['reached'] else 'NOT reached'}: {bar['name']}: {bar['measured']:.3g} ({bar['bar']})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True, help="JSON Lines with `prompt` or `text`")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--proxy", default="serve", help="of `pacos serve`: serve or haproxy")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, help="keep the servers' logs there")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    return parser.parse_args()


def read_prompts(file: Path) -> list[str]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row.get("prompt") or row["text"] for row in rows]


def completion(text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Long prompts are cut, so that any model's context has room for the answer."""
    return {
        "model": "pacos", "prompt": text[:600], "max_tokens": arguments.tokens, "temperature": 1.0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def plain_body(body: dict[str, Any]) -> dict[str, Any]:
    return {name: body[name] for name in ("prompt", "max_tokens", "temperature")}


def bare_engine(folder: str, bodies: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from app.data.tokenization import load_tokenizer
    from app.engine.engine import Engine, EngineSettings
    from app.engine.sampling import Sampling
    from app.models.checkpoints import load_decoder
    from app.models.precision import compute_dtype

    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(Path(folder))
    settings = EngineSettings(max_batch_size=arguments.batch_size, max_queue=len(bodies))
    dtype = compute_dtype("auto", torch.device("cpu"))  # as the endpoint's
    engine = Engine(load_decoder(Path(folder)).requires_grad_(False).to(dtype), settings)
    prompts = [tokenizer.encode(body["prompt"]) for body in bodies]

    def run(prompts: list[list[int]]) -> int:
        sampling = Sampling(max_tokens=arguments.tokens, temperature=1.0, ignore_eos=True)
        for ids in prompts:
            engine.add_request(ids, sampling)
        tokens = 0
        while engine.has_work:
            tokens += sum(event.token is not None for event in engine.step())
        return tokens

    run(prompts[:8])
    started = time.perf_counter()
    tokens = run(prompts)
    seconds = time.perf_counter() - started
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def measure_pacos(url: str, bodies: list[dict[str, Any]], arguments: argparse.Namespace, keep: Any) -> None:
    route = f"{url}/v1/completions"
    asyncio.run(closed_loop(route, bodies[:8], num_clients=8))  # warm
    result: dict[str, Any] = {}
    if {"pacos", "overload"} & set(arguments.parts):
        result = figures(asyncio.run(closed_loop(route, bodies, num_clients=arguments.clients)))
        keep("pacos", result)
    if "cached" in arguments.parts:
        same = {**bodies[0], "temperature": 0.0, "stream": False, "stream_options": None}
        asyncio.run(closed_loop(route, [same], num_clients=1))
        answers = asyncio.run(open_loop(route, [same] * (CACHED_PER_S * CACHED_S), per_s=CACHED_PER_S))
        keep("cached", figures(answers))
    if "overload" in arguments.parts:
        per_s = OVERLOAD * result["requests_per_s"]
        asked = [bodies[number % len(bodies)] for number in range(round(per_s * OVERLOAD_S))]
        answers = asyncio.run(open_loop(route, asked, per_s=per_s))
        keep("overload", {"asked_per_s": per_s, **figures(answers)})


def bars(parts: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def add(name: str, bar: str, measured: float, reached: bool) -> None:
        found.append({"name": name, "bar": bar, "measured": measured, "reached": reached})

    pacos, plain = parts.get("pacos"), parts.get("plain")
    if pacos:
        failed = pacos["requests"] - pacos["outcomes"].get("complete", 0)
        add("requests without an answer", "0", failed, failed == 0)
        if "engine" in parts:
            share = pacos["tokens_per_s"] / parts["engine"]["tokens_per_s"]
            add("tokens/s over the bare engine's", "at least 0.75", share, share >= 0.75)
        if plain:
            ratio = pacos["tokens_per_s"] / plain["tokens_per_s"]
            add("tokens/s over FastAPI with transformers", "at least 10", ratio, ratio >= 10)
    if "cached" in parts:
        milliseconds = 1000 * parts["cached"]["request_s"]["p50"]
        add("a cache hit's p50 at 50 requests/s, ms", "below 10", milliseconds, milliseconds < 10)
    if pacos and "overload" in parts:
        over = parts["overload"]
        strange = over["requests"] - sum(over["outcomes"].get(name, 0) for name in ("complete", "429"))
        add("requests at four times the load with neither an answer nor a 429", "0", strange, strange == 0)
        slower = over["request_s"]["p50"] / pacos["request_s"]["p50"]
        add("latency of those answered then, over before", "at most 1.5", slower, slower <= 1.5)
    return found


if __name__ == "__main__":
    main()
