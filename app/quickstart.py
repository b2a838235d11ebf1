"""`pacos quickstart`: the whole job, once, on what the project carries, on one cluster."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app import commands, console
from app.assets import carried_file
from app.config import (
    ApplicationConfig,
    AskConfig,
    EvaluateConfig,
    IndexConfig,
    PrepareConfig,
    QuickstartConfig,
    ServeConfig,
    TrainConfig,
    load_config,
    validate,
)
from app.errors import UserError
from app.serving.launch import check_port_is_free
from app.training.evaluate import plan_evaluation
from app.training.fine_tuning import plan_job

_MARKER = "made-by-quickstart.txt"


def quickstart(config: QuickstartConfig, *, address: str | None) -> None:
    """Prepare, train, evaluate before and after, index, serve and ask; then up until Ctrl-C at a terminal."""
    config = _with_carried_files(config)
    training = _checked(config)
    output = Path(config.output)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / _MARKER).write_text("Everything in this folder is made by `pacos quickstart` and replaced by it.\n")
    data, index = output / "data", output / "index"
    durations: dict[str, str] = {}
    with commands.on_ray(address, workers=training.workers) as is_own:
        with _stage("Prepare: records to token shards", durations):
            commands.run_prepare(PrepareConfig(source=(config.instructions,), output=str(data), model=training.model))
        with _stage("Evaluate the base model", durations):
            before = EvaluateConfig(
                data=str(data), model=training.model, answers=16, samples=1, workers=training.workers.fixed
            )
            commands.run_evaluate(plan_evaluation(before))
        with _stage("Train: LoRA with Ray Train and DeepSpeed", durations):
            summary = commands.run_train(plan_job(training))
        with _stage("Evaluate the tuned model", durations):
            after = before.model_copy(update={"delta": summary["result"], "samples": 3})
            commands.run_evaluate(plan_evaluation(after))
        with _stage("Index the documents", durations):
            commands.run_index(IndexConfig(documents=config.documents, output=str(index)))
        console.heading("Serve")
        started = time.monotonic()
        serve_config = _serve_config(config, training.model, summary["result"], index)
        with commands.serving(serve_config, on_own_cluster=is_own) as url:
            durations["Serve: deploy until healthy"] = f"{time.monotonic() - started:.1f} s"
            with _stage("Ask over HTTP", durations):
                _ask(config, url)
            console.heading("What each stage took")
            console.table("", durations)
            stays = sys.stdin.isatty() and sys.stdout.isatty()
            commands.show_addresses(url, title="Up" if stays else "It was up, and ends now: nobody is at a terminal")
            if stays:
                console.say(f'\nTry:  pacos ask "question=What do alpacas eat?" rag=true url={url}')
                console.say("Ctrl-C stops everything.", style="dim")
                commands.wait_for_interrupt()


def _with_carried_files(config: QuickstartConfig) -> QuickstartConfig:
    """Outside of the project's folder the examples are those that the package carries."""
    fields = ("instructions", "documents", "train")
    return config.model_copy(update={field: carried_file(getattr(config, field)) for field in fields})


def _checked(config: QuickstartConfig) -> TrainConfig:
    """The training settings. What would fail minutes from now fails at once, before anything is replaced."""
    for field in ("instructions", "documents", "train"):
        path = getattr(config, field)
        if not Path(path).exists():
            raise UserError(f"{field}={path!r} does not exist, neither here nor in what pacos carries; name the path")
    output = Path(config.output)
    if output.exists() and not (output / _MARKER).exists():
        raise UserError(f"output={config.output!r} exists and is not a quickstart's; name another folder")
    check_port_is_free("127.0.0.1", config.port)
    overrides = [f"data={output / 'data'}", f"output={output / 'train'}"]
    training = load_config(TrainConfig, file=config.train, overrides=overrides)
    if training.method.type == "full":
        raise UserError(f"train={config.train!r}: method.type='full' makes no delta to serve; use 'lora'")
    return training


def _serve_config(config: QuickstartConfig, model: str, delta: str, index: Path) -> ServeConfig:
    values = {
        "port": config.port,
        "generator": {"model": model, "deltas": {config.delta_name: delta}},
        "retriever": {"index": str(index.resolve())},
    }
    return validate(ServeConfig, values)


def _ask(config: QuickstartConfig, url: str) -> None:
    tuned = f"{ApplicationConfig().name}:{config.delta_name}"
    for question, rag in ((config.plain_question, False), (config.rag_question, True)):
        console.say(f"\nPOST /v1/chat/completions{' with rag' if rag else ''}  {question}", style="bold")
        commands.ask(AskConfig(question=question, url=url, model=tuned, rag=rag))


@contextmanager
def _stage(title: str, durations: dict[str, str]) -> Iterator[None]:
    console.heading(title)
    started = time.monotonic()
    yield
    durations[title] = f"{time.monotonic() - started:.1f} s"
