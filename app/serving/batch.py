"""`pacos generate`: answers to all prompts of a file, by engines in Ray Data's actors.

OUTPUT           a line for each prompt, in their order, once all are answered
OUTPUT.parts/    until then: what is answered, in parts of `part_size` prompts, and `job.json`, which says of what
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from app.assets import model_folder
from app.atomic import write_text
from app.config import GenerateConfig
from app.data.prompts import Template
from app.data.records import HALF_A_PAIR
from app.data.tokenization import Tokenizer, load_tokenizer
from app.engine.engine import Engine
from app.engine.events import InvalidRequest
from app.engine.sampling import Sampling
from app.errors import UserError
from app.methods.delta import check_base, read_delta
from app.models.checkpoints import load_decoder, read_provenance, weights_hash
from app.models.decoder import Decoder
from app.models.precision import compute_dtype
from app.ray_cluster import thread_environment
from app.run_lock import locked
from app.serving.model_library import template_of, with_delta
from app.serving.registered_deltas import delta_folder, with_pinned_delta
from app.serving.text_stream import TextStream

_FIELDS = ("instruction", "prompt", "question", "text")
_JOB = "job.json"
_ADDED = ("answer", "finish_reason", "prompt_tokens", "answer_tokens", "error")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """A checked configuration with the prompts that it names."""

    config: GenerateConfig
    records: list[dict[str, Any]]
    folder: Path
    """OUTPUT.parts"""
    done: frozenset[int] = frozenset()
    """Parts that are there."""

    @property
    def num_parts(self) -> int:
        return -(-len(self.records) // self.config.part_size)

    def part(self, number: int) -> list[dict[str, Any]]:
        size = self.config.part_size
        return self.records[number * size : (number + 1) * size]

    def file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"


@contextmanager
def plan_answers(config: GenerateConfig, *, resume: bool) -> Iterator[Plan]:
    """Check everything that can be checked before Ray starts; the output is this job's within the block.

    Raises:
        UserError: prompts, model or delta cannot be read or do not fit together; or the output is there already, or
            parts of it, and `resume` is not asked for, or they are of another job; or another process writes it.
    """
    records = read_prompts(config)
    config = with_pinned_delta(config)
    identity = _identity(config, records)
    output, folder = Path(config.output), Path(f"{config.output}.parts")
    if output.exists():
        raise UserError(f"output={config.output!r} is there already; remove it, or name another")
    with locked(folder):
        job = folder / _JOB
        if job.exists():
            if not resume:
                raise UserError(f"{str(folder)!r} holds answers of an earlier run; --resume keeps them, or remove it")
            if json.loads(job.read_text())["identity"] != identity:
                raise UserError(
                    f"{str(folder)!r} holds answers to other prompts, or of another model or other settings; remove "
                    "it, or name another output"
                )
        write_text(job, json.dumps({"identity": identity, "config": config.model_dump(mode="json")}, indent=2) + "\n")
        plan = Plan(config, records, folder)
        yield replace(plan, done=frozenset(number for number in range(plan.num_parts) if plan.file(number).exists()))


def generate_answers(plan: Plan, *, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Answer the parts that are not there yet, and write the output; Ray is initialised."""
    started = time.perf_counter()
    done = sum(len(plan.part(number)) for number in plan.done)
    kept = done
    progress(done, len(plan.records))
    for number, lines in _answered_parts(plan):
        write_text(plan.file(number), "".join(f"{line}\n" for line in lines))
        done += len(lines)
        progress(done, len(plan.records))
    answers = [line for number in range(plan.num_parts) for line in _lines(plan.file(number).read_text("utf-8"))]
    write_text(Path(plan.config.output), "".join(f"{line}\n" for line in answers))
    shutil.rmtree(plan.folder)
    seconds = time.perf_counter() - started
    results = [json.loads(line) for line in answers]
    failed = [result["error"] for result in results if "error" in result]
    return {
        "answers": len(results) - len(failed),
        "kept from an earlier run": kept or None,
        "without an answer": f"{len(failed)}: {failed[0]}" if failed else None,
        "tokens": sum(result.get("answer_tokens", 0) for result in results),
        "seconds": round(seconds, 1),
    }


def read_prompts(config: GenerateConfig) -> list[dict[str, Any]]:
    """The records of `config.prompts`, with a replacement character for each half of a surrogate pair.

    Raises:
        UserError: the file cannot be read, is empty, or a record has no prompt.
    """
    file = Path(config.prompts)
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            records: Any = [{"prompt": line} for line in _lines(text)]
        elif file.suffix == ".jsonl":
            records = [json.loads(line) for line in _lines(text)]
        else:
            records = json.loads(text)
    except OSError as error:
        raise UserError(f"prompts={config.prompts!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"prompts={config.prompts!r} cannot be read: {error}") from None
    if _ESCAPED_SURROGATE.search(text):  # no other text can hold half of a pair
        records = json.loads(HALF_A_PAIR.sub("\ufffd", json.dumps(records, ensure_ascii=False)))
    if not isinstance(records, list) or not records:
        raise UserError(f"prompts={config.prompts!r} holds no list of prompts")
    for number, record in enumerate(records, start=1):
        _check_record(config, record, number)
    return records


def _lines(text: str) -> list[str]:
    """Those that say something. A line feed alone ends one: JSON may hold U+2028, at which `splitlines` cuts."""
    return [line for line in text.split("\n") if line.strip()]


def _check_record(config: GenerateConfig, record: Any, number: int) -> None:
    if not isinstance(record, dict):
        raise UserError(f"prompts={config.prompts!r}: record {number} is no object, but {str(record)[:40]!r}")
    name = _prompt_field(config, record)
    if name is None or not isinstance(record.get(name), str) or not record[name].strip():
        wanted = f"field={config.field!r}" if config.field else f"any of {', '.join(_FIELDS)}"
        raise UserError(f"prompts={config.prompts!r}: record {number} has no text in {wanted}: {str(record)[:80]}")


def _prompt_field(config: GenerateConfig, record: dict[str, Any]) -> str | None:
    return config.field or next((name for name in _FIELDS if name in record), None)


def _identity(config: GenerateConfig, records: list[dict[str, Any]]) -> str:
    """A hash of all that the answers depend on, and of how they are divided."""
    folder = model_folder(config.model)
    asked = config.model_dump(mode="json", exclude={"prompts", "output", "workers", "max_batch_size", "tracking"})
    weights = [weights_hash(folder)]
    if config.delta:
        trained = delta_folder(config.delta, config.tracking)
        delta = read_delta(trained)
        tokenizer_hash = load_tokenizer(folder).fingerprint()
        check_base(delta, config.delta, base_hash=weights[0], tokenizer_hash=tokenizer_hash)
        weights.append(delta.hash)
    return hashlib.sha256(json.dumps([asked, weights, records], sort_keys=True).encode()).hexdigest()


def _answered_parts(plan: Plan) -> Iterable[tuple[int, list[str]]]:
    """Parts as they are answered, in any order."""
    import ray.data

    workers = plan.config.workers
    numbers = [number for number in range(plan.num_parts) if number not in plan.done]
    if not numbers:
        return
    rows = [{"number": number, "records": json.dumps(plan.part(number))} for number in numbers]
    answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        AnswerActor,
        fn_constructor_args=(plan.config,),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers.count),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        runtime_env={"env_vars": thread_environment(workers)},
    )
    answered.context.enable_progress_bars = False  # the caller shows progress
    for row in answered.iter_rows():
        yield row["number"], json.loads(row["lines"])


class AnswerActor:
    """One worker: loads the model once, then answers the parts that it is given."""

    def __init__(self, config: GenerateConfig) -> None:
        torch.set_num_threads(config.workers.threads)
        self._answerer = Answerer(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        records = json.loads(row["records"])
        first = row["number"] * self._answerer.config.part_size
        lines = [json.dumps(result, ensure_ascii=False) for result in self._answerer.answer(records, first=first)]
        return {"number": row["number"], "lines": json.dumps(lines)}


class Answerer:
    """A model with an engine, from records to records with answers. Knows no Ray."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        folder = model_folder(config.model)
        self._tokenizer: Tokenizer = load_tokenizer(folder)
        self._template: Template = template_of(read_provenance(folder))
        model: Decoder
        if config.delta:
            delta = read_delta(delta_folder(config.delta, config.tracking))  # the plan has proved that it fits
            model = with_delta(folder, delta)
            self._template = template_of(delta.metadata)
        else:
            model = load_decoder(folder)
        device = torch.device("cuda" if config.workers.gpus else "cpu")
        self._engine = Engine(
            model.requires_grad_(False).to(device, compute_dtype(config.precision, device)),
            max_batch_size=config.max_batch_size,
            max_queue=config.part_size,
        )

    def answer(self, records: list[dict[str, Any]], *, first: int) -> list[dict[str, Any]]:
        """`records`, of which the first is number `first` of all, with their answers, in their order."""
        results = [{key: value for key, value in record.items() if key not in _ADDED} for record in records]
        texts: dict[int, tuple[int, TextStream, list[str]]] = {}
        for number, result in enumerate(results):
            ids = self._tokenizer.encode(self._prompt(result))
            result["prompt_tokens"] = len(ids)
            try:
                request_id = self._engine.add_request(ids, self._sampling(first + number))
            except InvalidRequest as error:
                result["error"] = str(error)
            else:
                result["answer_tokens"] = 0
                texts[request_id] = (number, TextStream(self._tokenizer, stop=self.config.stop), [])
        while self._engine.has_work:
            for event in self._engine.step():
                number, text, parts = texts[event.request_id]
                reason: str | None = event.finish_reason
                if event.token is not None:
                    results[number]["answer_tokens"] += 1
                    parts.append(text.push(event.token))
                if text.stopped:
                    if reason is None:
                        self._engine.abort(event.request_id)
                    reason = "stop"
                elif reason:
                    parts.append(text.finish())
                if reason:
                    results[number] |= {"answer": "".join(parts).strip(), "finish_reason": reason}
        return results

    def _prompt(self, record: dict[str, Any]) -> str:
        name = _prompt_field(self.config, record)
        assert name is not None  # looked at when the file was read
        if self.config.raw:
            return record[name]
        given = record.get("input", "") if name == "instruction" else ""
        return self._template.prompt(record[name].strip(), given if isinstance(given, str) else "")

    def _sampling(self, number: int) -> Sampling:
        config = self.config
        return Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=config.seed + number,
            stop_ids=frozenset({self._tokenizer.end_id}),
        )
