"""One function per subcommand: connect to Ray, call the job, show how it goes and what came of it."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from app import console
from app.config import (
    AnyWorkersConfig,
    AskConfig,
    DeltasConfig,
    DescribeConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    IndexConfig,
    InspectConfig,
    KeyConfig,
    MergeConfig,
    ModelsConfig,
    PrepareConfig,
    PretrainConfig,
    PromoteConfig,
    QuantizeConfig,
    ServeConfig,
    TrainConfig,
)
from app.config.methods import name_of
from app.display.dry_run import show_forecast
from app.display.evaluation import show_evaluations
from app.display.training import show_pretrained, show_promoted, show_trained, show_versions, training_progress
from app.errors import UserError
from app.ray_cluster import connected, dashboard_url

Address = str | None


def prepare(config: PrepareConfig, *, address: Address) -> None:
    run_prepare(config, on_ray=lambda: on_ray(address))


def inspect(config: InspectConfig) -> None:
    from app.data.inspection import inspect as look
    from app.data.report import write_report

    inspection = look(config)
    show_inspection(inspection)
    console.say(f"Report: {write_report(inspection, config)}")


def pretrain(config: PretrainConfig, *, address: Address, resume: bool) -> None:
    from app.training.pretraining import check_sources
    from app.training.pretraining import pretrain as run

    check_sources(config)
    with (
        on_ray(address, workers=config.workers, spare_cpus=0),
        training_progress("pretrain", config.steps) as show,
    ):
        summary = run(config, resume=resume, on_metrics=show, warn=_warn)
    show_pretrained(config.output, summary)


def train(config: TrainConfig, *, address: Address, resume: bool, dry_run: bool = False) -> None:
    from app.training.fine_tuning import plan_job

    job = plan_job(config)  # mistakes in data, model or method are told before Ray starts
    if dry_run:
        run_dry(job, resume=resume)
        return
    with on_ray(address, workers=config.workers):
        run_train(job, resume=resume)


def evaluate(config: EvaluateConfig, *, address: Address) -> None:
    from app.training.evaluate import plan_evaluation

    plan = plan_evaluation(config)  # mistakes are told before Ray starts
    with on_ray(address, workers=config.workers):
        run_evaluate(plan)


def describe(config: DescribeConfig) -> None:
    from app.methods.description import describe_model

    show_description(config, describe_model(config))


def deltas(config: DeltasConfig) -> None:
    from app.methods.transfer import find_deltas, summary

    found = [summary(listed) for listed in find_deltas(Path(config.folder))]
    if not found:
        console.say(f"no delta below {config.folder}; `pacos train` makes one")
    for line in found:
        console.table(str(line.pop("folder")), line)


def merge(config: MergeConfig) -> None:
    from app.methods.transfer import merge as run

    merged = run(config)
    console.table(
        f"Merged → {merged.output}",
        {
            "weights": merged.parameters,
            "largest logit difference": f"{merged.largest_difference:.2g}, of logits up to {merged.largest_logit:.3g}",
        },
    )


def export(config: ExportConfig) -> None:
    from app.methods.transfer import export as run

    run(config)
    console.say(f"Exported in the format of {config.format} → {config.output}")


def import_(config: ImportConfig) -> None:
    from app.methods.transfer import import_adapter

    delta = import_adapter(config)
    console.say(f"Imported {name_of(delta.method)} → {config.output}; pass it as delta={config.output}")


def quantize(config: QuantizeConfig) -> None:
    from app.training.quantizing import run

    with console.console.status("reading") as status:
        result = run(config, progress=status.update)
    show_quantized(config, result)


def models(config: ModelsConfig) -> None:
    from app.tracking.registry import list_versions

    show_versions(list_versions(config.tracking.uri))


def promote(config: PromoteConfig) -> None:
    from app.tracking.registry import promote as run

    show_promoted(config, run(config))


def key(config: KeyConfig) -> None:
    from app.serving.access import new_key

    made = new_key(config)
    console.say(f"added {config.name!r} to {config.keys_file}; the key, which is shown only now:", style="dim")
    console.say(made)


def index(config: IndexConfig, *, address: Address) -> None:
    from app.retrieval.documents import find_files
    from app.retrieval.folder import check_output

    check_output(Path(config.output))
    find_files(config.documents)  # a wrong folder is told before Ray starts; what is in the files, by the job
    with on_ray(address, workers=config.workers):
        run_index(config)


def serve(config: ServeConfig, *, address: Address) -> None:
    from app.serving.launch import check_folders, check_port_is_free, cluster_environment, finish_requests

    check_folders(config)
    with TemporaryDirectory(prefix="pacos-") as folder:
        environment = cluster_environment(config, folder=Path(folder))
        if not (address or os.environ.get("RAY_ADDRESS")):  # else Serve may run there already, and hold the port itself
            check_port_is_free(config.host, config.port)
            os.environ.update(environment)
        elif environment:
            names = " ".join(f"{name}={value}" for name, value in environment.items() if not value.startswith(folder))
            raise UserError(
                f"the cluster runs already; leave out tracing and proxy, and have its nodes started with {names}"
            )
        with on_ray(address) as is_own, serving(config, on_own_cluster=is_own) as url:
            show_addresses(url)
            console.say("Ctrl-C stops it.", style="dim")
            wait_for_interrupt()
            console.say("finishing what was accepted; Ctrl-C again does not wait for it", style="dim")
            with suppress(KeyboardInterrupt):
                finish_requests(config.drain_s)


def check_serving(config: ServeConfig) -> None:
    from app.serving.launch import check_folders

    check_folders(config)
    console.say("nothing is wrong with these settings")


def generate(config: GenerateConfig, *, address: Address, resume: bool) -> None:
    from app.serving.batch import generate_answers, plan_answers

    with (
        plan_answers(config, resume=resume) as plan,
        on_ray(address, workers=config.workers),
        console.progress("generate", unit="prompts") as advance,
    ):
        summary = generate_answers(plan, progress=advance)
    console.table(f"Answers → {config.output}", summary)


def ask(config: AskConfig) -> None:
    from app.serving.ask import ask as send

    show_answer(send(config))


def cluster_up(*, nodes: int, cpus: int | None) -> None:
    from app.local_cluster import local_cluster
    from app.ray_cluster import TAKES_NODES

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the nodes are ended then, too
    each = cpus or max(1, (os.cpu_count() or 1) // nodes)
    console.say(f"starting a head and {nodes} workers of {each} CPUs", style="dim")
    with local_cluster(nodes=nodes, cpus=each) as cluster, suppress(KeyboardInterrupt):
        console.say(f"Up: `pacos … --address {cluster.gcs}`; for `ray` and `serve` in another terminal:")
        settings = {"RAY_AUTH_MODE": "token", TAKES_NODES: "0"}  # else Ray looks for 127.0.0.1 at another address
        settings |= dict.fromkeys(("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"), cluster.dashboard)
        print("export", *(f"{name}={value}" for name, value in settings.items()), flush=True)
        console.say("Ctrl-C ends all of it.")
        wait_for_interrupt()


# --- the parts, which quickstart strings together on one cluster --------------------------------


def run_prepare(config: PrepareConfig, *, on_ray: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Prepare, unless that is done; `on_ray` connects, once what can be checked without Ray is checked."""
    from app.data.prepare import opened, plan_preparation, run
    from app.data.shards import read_manifest

    plan = plan_preparation(config)
    if manifest := plan.finished():
        console.say(f"{config.output} is up to date: made from the same sources with the same settings")
    else:
        with opened(plan) as work, on_ray():
            run(work, progress=lambda name: console.progress(name, unit="records"))
        manifest = read_manifest(config.output)
    show_prepared(config, manifest.values)


def show_prepared(config: PrepareConfig, values: dict[str, Any]) -> None:
    splits, train = values["splits"], values["splits"]["train"]
    formats = ", ".join(sorted({source["format"] for source in values["sources"]}))
    console.table(
        f"Prepared {', '.join(config.source)} → {config.output}",
        {
            "records read": f"{values['rows']:,} ({formats})",
            "kept for training": train["records"],
            "held out": splits["validation"]["records"],
            "held out for a test": splits["test"]["records"] or None,
            "dropped": _counts(values["rejected"]),
            "repaired": _counts(values["repaired"]),
            "training tokens": train["tokens"],
            "of them in the loss": train["loss_tokens"],
            "packed into rows": train["rows"] if train["rows"] != train["records"] else None,
        },
    )


def show_inspection(inspection: Any) -> None:
    """Samples, prompts dimmed; then the lengths and the figures."""
    for sample in inspection.samples:
        console.say_parts([(part.text, None if part.in_loss else "dim") for part in sample.parts])
        note = "" if sample.round_trips else "   DIFFERS after encoding the text again"
        console.say(f"{sample.num_tokens} tokens, {sample.loss_tokens} in the loss{note}\n", style="cyan")
    console.bars("tokens a record", inspection.length_bars())
    console.table("", inspection.figures())


def show_description(config: DescribeConfig, description: Any) -> None:
    total, trained = description.parameters, description.trained
    rows = [
        (
            row.full_name,
            " + ".join("×".join(map(str, shape)) for shape in row.shapes),
            f"{row.parameters:,}",
            "trains" if row.trains else "",
            f"{100 * row.parameters / total:.2f} %",
            *(console.in_bytes(size) for size in (row.weight_bytes, row.gradient_bytes, row.optimizer_bytes)),
        )
        for row in description.rows
    ]
    sizes = [
        sum(getattr(row, f"{kind}_bytes") for row in description.rows) for kind in ("weight", "gradient", "optimizer")
    ]
    rows.append(("total", "", f"{total:,}", "", "100 %", *map(console.in_bytes, sizes)))
    method = f" with {name_of(config.method)}" if config.method else ""
    console.grid(
        f"{config.model}{method}",
        ("module", "shape", "weights", "", "share", "memory", "gradients", "optimizer"),
        rows,
        right=(2, 4, 5, 6, 7),
    )
    if config.method:
        console.say(f"{trained:,} of {total:,} weights train: {100 * trained / total:.3g} %")


def show_quantized(config: QuantizeConfig, result: Any) -> None:
    before, after = vars(result.before), vars(result.after)
    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("file_bytes", "file", console.in_bytes),
        ("peak_bytes", "peak memory of the process", console.in_bytes),
        ("first_token_s", "first token, one prompt", lambda value: f"{1000 * value:.1f} ms"),
        ("token_s", "each token after it", lambda value: f"{1000 * value:.2f} ms"),
        ("tokens_per_s", "tokens/s, sixteen prompts", lambda value: f"{value:,.0f}"),
        ("perplexity", "held-out perplexity", lambda value: f"{value:.3f}"),
    ]
    layers = result.layers
    rows = [
        ("layers quantized", console.in_bytes(layers.fp32), console.in_bytes(layers.quantized),
         _percent(layers.fp32, layers.quantized)),
        ("the same, stored in bf16", console.in_bytes(layers.bf16), "", _percent(layers.bf16, layers.quantized)),
    ]  # fmt: skip
    for key, name, text in shown:
        if before[key] is not None:
            rows.append((name, text(before[key]), text(after[key]), _percent(before[key], after[key])))
    console.grid(
        f"{config.model} → {result.output}",
        ("", "full precision", config.scheme, "change"),
        rows,
        right=(1, 2, 3),
        last=False,
    )


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"


def run_train(job: Any, *, resume: bool = False) -> dict[str, Any]:
    """Run what `plan_job` planned."""
    from app.training.fine_tuning import fine_tune

    config: TrainConfig = job.config
    console.say(
        f"{name_of(config.method)} trains {job.trained_count:,} weights beside {job.total_count:,}; "
        f"{job.total_steps:,} steps of {config.batch_size} rows on {_worker_count(config)}, "
        f"ZeRO-{config.deepspeed.zero_stage}"
    )
    with training_progress("train", job.total_steps) as show:
        summary = fine_tune(job, resume=resume, on_metrics=show, warn=_warn)
    show_trained(config, summary)
    return summary


def _worker_count(config: TrainConfig) -> str:
    least, most = config.workers.least, config.workers.most
    if least < most:
        return f"{least} to {most} workers"
    return f"{most} worker{'s' if most > 1 else ''}"


def run_dry(job: Any, *, resume: bool) -> None:
    """Tell what `run_train` would need and take."""
    from app.training.dry_run import dry_run

    with console.console.status("planning") as status:
        forecast = dry_run(job, resume=resume, progress=status.update)
    show_forecast(forecast)


def run_evaluate(plan: Any) -> None:
    """Run what `plan_evaluation` planned."""
    from app.training.evaluate import evaluate as run
    from app.training.evaluate import plot_file, write_evaluations

    with console.progress("evaluate", unit="rows and answers") as advance:
        results = run(plan, progress=advance)
    show_evaluations(plan.config, results)
    write_evaluations(plan.config, results)
    if plan.config.output and len(results) > 1:
        console.say(f"Plot: {plot_file(plan.config)}")


def run_index(config: IndexConfig) -> None:
    from app.serving.index_job import build_index as run

    with console.progress("index", unit="passages") as advance:
        summary = run(config, progress=advance)
    console.table(
        f"Indexed {config.documents} → {config.output}", {**summary, "skipped": ", ".join(summary["skipped"])}
    )


@contextmanager
def on_ray(address: Address, *, workers: AnyWorkersConfig | None = None, spare_cpus: float = 1) -> Iterator[bool]:
    """Ray with room for the least of `workers`, and beside them for tasks that read their data or for deployments.

    Yields whether the cluster ends with the block.
    """
    count = workers.least if workers else 0
    cpus, gpus = (workers.cpus, workers.gpus) if workers else (0.0, 0.0)
    with connected(address, min_cpus=count * cpus + spare_cpus, min_gpus=count * gpus) as is_own:
        if url := dashboard_url():
            console.say(f"Ray dashboard: {url}", style="dim")
        yield is_own


@contextmanager
def serving(config: ServeConfig, *, on_own_cluster: bool) -> Iterator[str]:
    """The application, deployed for the block; yields its address. A cluster of our own takes it down itself."""
    from app.serving.launch import serve_application, stop_application

    with console.console.status("deploying"):
        url = serve_application(config)  # leaves nothing behind if it fails
    try:
        yield url
    finally:
        if not on_own_cluster:
            stop_application()


def show_answer(answer: Any) -> None:
    console.say(answer["text"])
    for number, source in enumerate(answer.get("sources", ()), start=1):
        console.say(f"  [{number}] {source['document']} ({source['score']:.2f}): {source['text'][:120]}…", style="dim")


def show_addresses(url: str, *, title: str = "Up") -> None:
    console.table(
        title,
        {
            "playground": url,
            "endpoint": f"{url}/v1/chat/completions",
            "documentation": f"{url}/docs",
            "dashboard": dashboard_url(),
        },
    )


def wait_for_interrupt() -> None:
    """Until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own handler aborts the process
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.say("stopping", style="dim")


def _counts(reasons: dict[str, int]) -> str:
    listed = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.items())
    return f"{sum(reasons.values()):,}" + (f" — {listed}" if listed else "")


def _warn(text: str) -> None:
    console.say(text, style="yellow")
