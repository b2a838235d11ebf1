"""The `pacos` command. Each subcommand reads its configuration, connects to Ray and calls one function.

Nothing heavy is imported before a command needs it, so that `--help` answers at once. `jobs/*.py` are the same
commands as scripts, for `ray job submit`.
"""

import importlib
import sys
from typing import Annotated, Any

import typer

from app import __version__
from app.errors import UserError

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune and serve instruction-following language models on one Ray cluster.",
)

cluster = typer.Typer(no_args_is_help=True, help="A cluster of several nodes on this machine.")
cli.add_typer(cluster, name="cluster")

_MODULES = {"quickstart": "app.quickstart", "sweep": "tune.commands", "promote_best": "tune.commands"}
"""Where the function of a command is, if not in `app.commands`."""

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, over the file's.")]
ConfigFile = Annotated[str | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file of settings.")]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="Running Ray cluster; none starts a local one."),
]
Format = Annotated[str, typer.Option("--format", metavar="NAME", help="Whose format: peft.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Tell memory, steps, tokens and time, from a trial of three steps; train not.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in `output`.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@cli.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What stands before a command."""


@cli.command()
def prepare(overrides: Overrides = None, config: ConfigFile = None, address: Address = None) -> None:
    """Instruction records to tokenized Parquet shards."""
    _run("prepare", "PrepareConfig", overrides, config, address=address)


@cli.command()
def inspect(
    data: Annotated[str, typer.Argument(metavar="PATH", help="Folder that `pacos prepare` wrote.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
) -> None:
    """What prepared data looks like: samples, lengths, packing; and a page with plots."""
    _run("inspect", "InspectConfig", [f"data={data}", *(overrides or ())], config)


@cli.command()
def pretrain(
    overrides: Overrides = None, config: ConfigFile = None, address: Address = None, resume: Resume = False
) -> None:
    """A tokenizer and a GPT-2-shaped model from scratch."""
    _run("pretrain", "PretrainConfig", overrides, config, address=address, resume=resume)


@cli.command()
def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    address: Address = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a model on prepared shards."""
    _run("train", "TrainConfig", overrides, config, address=address, resume=resume, dry_run=dry_run)


@cli.command()
def sweep(
    overrides: Overrides = None, config: ConfigFile = None, address: Address = None, resume: Resume = False
) -> None:
    """Many training runs: which technique, which size, which learning rate."""
    _run("sweep", "SweepConfig", overrides, config, address=address, resume=resume)


@cli.command()
def evaluate(overrides: Overrides = None, config: ConfigFile = None, address: Address = None) -> None:
    """Loss and perplexity on held-out records, and sample answers."""
    _run("evaluate", "EvaluateConfig", overrides, config, address=address)


@cli.command()
def describe(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="`embedded`, a folder, or a Hugging Face name.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
) -> None:
    """What a technique trains in a model, and what memory that takes: `pacos describe gpt2 method.type=lora`."""
    _run("describe", "DescribeConfig", [f"model={model}", *(overrides or ())], config)


@cli.command()
def deltas(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Searched with all that is below it.")] = "runs",
) -> None:
    """The deltas below a folder: technique, base, size, held-out loss."""
    _run("deltas", "DeltasConfig", [f"folder={folder}"], None)


@cli.command()
def merge(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """A delta and its base to a plain model folder."""
    _run("merge", "MergeConfig", overrides, config)


@cli.command()
def export(overrides: Overrides = None, config: ConfigFile = None, format: Format = "peft") -> None:
    """A delta to the format of another library."""
    _run("export", "ExportConfig", [f"format={format}", *(overrides or ())], config)


@cli.command(name="import")
def import_(overrides: Overrides = None, config: ConfigFile = None, format: Format = "peft") -> None:
    """Another library's adapter to a delta."""
    _run("import_", "ImportConfig", [f"format={format}", *(overrides or ())], config)


@cli.command()
def quantize(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """A smaller model folder, and its size, speed and perplexity beside full precision."""
    _run("quantize", "QuantizeConfig", overrides, config)


@cli.command()
def models(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """What is in the model registry: names, versions, aliases, figures."""
    _run("models", "ModelsConfig", overrides, config)


@cli.command()
def promote(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A registered model.")] = None,
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="Which of its versions.")] = None,
    overrides: Overrides = None,
    config: ConfigFile = None,
    best: Annotated[
        str | None, typer.Option("--best", metavar="SWEEP", help="Register and promote the winner of that sweep.")
    ] = None,
) -> None:
    """A registered version to production: what `models:/NAME@production` in a server's settings means."""
    given = [*filter(None, (name, version)), *(overrides or ())]
    if best is not None:
        _run("promote_best", "PromoteBestConfig", [f"best={best}", *given], config)
        return
    if name is None or version is None:
        raise typer.BadParameter("name a registered model and a version, or --best SWEEP")
    _run("promote", "PromoteConfig", [f"name={name}", f"version={version}", *(overrides or ())], config)


@cli.command()
def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
) -> None:
    """A new API key for an endpoint: its hash to keys_file=FILE, the key itself to the terminal."""
    _run("key", "KeyConfig", [f"name={name}", *(overrides or ())], config)


@cli.command()
def index(overrides: Overrides = None, config: ConfigFile = None, address: Address = None) -> None:
    """A folder of documents to a searchable index."""
    _run("index", "IndexConfig", overrides, config, address=address)


@cli.command()
def serve(
    overrides: Overrides = None,
    config: ConfigFile = None,
    address: Address = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only say whether the settings, or a file for `serve deploy`, would do."),
    ] = False,
) -> None:
    """An HTTP endpoint for a model, its deltas and an index, until Ctrl-C."""
    if check and config is not None:
        from app.serving.check import check_deploy_file, is_deploy_file

        if is_deploy_file(config):
            print(f"{config}: {', '.join(check_deploy_file(config))}: nothing is wrong with it")
            return
    if check:
        _run("check_serving", "ServeConfig", overrides, config)
    else:
        _run("serve", "ServeConfig", overrides, config, address=address)


@cli.command()
def generate(
    prompts: Annotated[str, typer.Argument(metavar="FILE", help="Prompts: .jsonl, .json or .txt.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    address: Address = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the answers that an earlier run wrote.")] = False,
) -> None:
    """Answers to all prompts of a file: `pacos generate prompts.jsonl output=answers.jsonl`."""
    _run(
        "generate", "GenerateConfig", [f"prompts={prompts}", *(overrides or ())], config, address=address, resume=resume
    )


@cli.command()
def ask(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """One question to a running endpoint: `pacos ask "question=How often are alpacas shorn?" rag=true`."""
    _run("ask", "AskConfig", overrides, config)


@cli.command()
def quickstart(overrides: Overrides = None, config: ConfigFile = None, address: Address = None) -> None:
    """The whole job on what the project carries: prepare, train, evaluate, index, serve, ask."""
    _run("quickstart", "QuickstartConfig", overrides, config, address=address)


@cluster.command()
def up(
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Workers, beside a head without work.")] = 2,
    cpus: Annotated[
        int | None, typer.Option("--cpus", min=1, metavar="N", help="Logical CPUs of each; none divides the machine's.")
    ] = None,
) -> None:
    """Start a head and N workers here, without containers; Ctrl-C ends them."""
    from app.commands import cluster_up

    cluster_up(nodes=nodes, cpus=cpus)


def main(*prefix: str) -> None:
    """Run the command line; `prefix` stands before the process's own arguments (the scripts in jobs/ name theirs)."""
    try:
        cli(args=[*prefix, *sys.argv[1:]], standalone_mode=True)
    except Exception as error:
        mistake = _user_error(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


def _run(command: str, schema: str, overrides: list[str] | None, file: str | None, **options: Any) -> None:
    """Load the configuration, and only when it is valid the code of the command."""
    import app.config

    settings = app.config.load_config(getattr(app.config, schema), file=file, overrides=overrides or ())
    module = importlib.import_module(_MODULES.get(command, "app.commands"))
    try:
        getattr(module, command)(settings, **options)
    except KeyboardInterrupt as stop:
        remedy = "; --resume goes on from there" if "resume" in options else ""
        print(str(stop) or f"stopped{remedy}", file=sys.stderr)
        sys.exit(130)


def _user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake in `error`, also where a Ray task raised it and Ray wrapped it."""
    while error is not None:
        wrapped = getattr(error, "cause", None)
        if isinstance(error, UserError) and not isinstance(wrapped, UserError):
            return error
        error = wrapped if isinstance(wrapped, BaseException) else error.__cause__
    return None


if __name__ == "__main__":
    main()
