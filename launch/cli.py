"""The command line `diptych`: arguments in, exit code out. What a command does lives in the modules it calls.

Those are imported inside the commands: `--help` must not wait for torch.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain import __version__
from pretrain.errors import EXIT_FAILED, EXIT_RESUME_ME, EXIT_WRONG_INPUT, UserError

if TYPE_CHECKING:
    from pretrain.config import RunConfig

app = typer.Typer(
    name="diptych",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]diptych quickstart[/bold]. "
    "Exit codes: 0 done, 2 your input is wrong, 75 run the same command again to resume, 1 anything else.",
)
data_app = typer.Typer(no_args_is_help=True, help="Build, verify and look at a corpus.")
evaluate_app = typer.Typer(no_args_is_help=True, help="Measure a trained encoder.")
probe_app = typer.Typer(no_args_is_help=True, help="Train small encoders on a synthetic task, to compare their kinds.")
model_app = typer.Typer(no_args_is_help=True, help="Look at an encoder before it is trained.")
config_app = typer.Typer(no_args_is_help=True, help="Look at configs and their schema.")
app.add_typer(data_app, name="data")
app.add_typer(evaluate_app, name="evaluate")
evaluate_app.add_typer(probe_app, name="probe")
app.add_typer(config_app, name="config")
app.add_typer(model_app, name="model")

Config = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a config that comes with Diptych: quickstart."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the config, for instance training.tokens=1000000."),
]
ConfigOrCorpus = Annotated[
    str, typer.Argument(metavar="CONFIG_OR_CORPUS", help="A config, or a corpus folder (with a manifest.json).")
]


class OnBad(StrEnum):
    """What to do with a record that cannot be read."""

    ERROR = "error"
    SKIP = "skip"


class Split(StrEnum):
    """Held-out documents."""

    VALID = "valid"
    TEST = "test"


class Attention(StrEnum):
    """Kinds of encoders."""

    DUAL_TRIANGLE = "dual_triangle"
    BIDIRECTIONAL = "bidirectional"
    CAUSAL = "causal"


class Positions(StrEnum):
    """How an encoder is told where its tokens stand."""

    NONE = "none"
    ROTARY = "rotary"
    LEARNED = "learned"


def main() -> None:
    """Entry point of the `diptych` command."""
    try:
        app(prog_name="diptych")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_WRONG_INPUT)


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C or SIGTERM inside: say how to go on, and exit with 75."""
    process = os.getpid()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != process:
            # A forked worker, which has inherited this handler.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        raise typer.Exit(EXIT_RESUME_ME) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"diptych {__version__}")
        raise typer.Exit


@app.callback()
def diptych(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Pretrain dual-triangle encoders: from raw text or proteins to a trained encoder and its context report."""


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """From documents to a context report in minutes.

    Collects the documentation of the installed Python packages, builds a corpus, trains an encoder of a million
    parameters and evaluates it. Works in the current folder (corpora/ and runs/). Interrupt it anywhere and run it
    again: it goes on.

    [bold]Example:[/bold] diptych quickstart training.tokens=1000000
    """
    from launch.quickstart import run_quickstart

    with resumable():
        exit_code = run_quickstart(overrides or [])
    raise typer.Exit(exit_code)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes; by default one per GPU, or one.")
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Resume although KEY changed, which makes it another run. Repeatable."),
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Write the context report at the end.")] = True,
) -> None:
    """Train a config on this machine, or resume it.

    Builds the corpus first if it is not there. Ctrl-C saves and ends (exit code 75); the same command resumes.

    [bold]Example:[/bold] diptych train my.yaml --nproc 2 name=first training.tokens=1000000
    """
    from launch.display import make_console
    from launch.train import choose_num_ranks
    from launch.train import train as train_run
    from pretrain.config import load_config

    with resumable():
        run = load_config(config, overrides or [])
        num_ranks = choose_num_ranks(run, nproc)
        exit_code = train_run(run, num_ranks, make_console(), allow_change=allow_change or [], evaluate=evaluate)
    raise typer.Exit(exit_code)


@data_app.command("build")
def data_build(
    config: Config,
    overrides: Overrides = None,
    on_bad: Annotated[
        OnBad | None, typer.Option(help="A record that cannot be read: stop and name it, or skip and count it.")
    ] = None,
) -> None:
    """Build a config's corpus.

    Trains the tokenizer, splits the documents, writes shards and the manifest. Can be interrupted and run again.

    [bold]Example:[/bold] diptych data build my.yaml corpus.processes=8 --on-bad skip
    """
    from launch.display import make_console
    from launch.tables import corpus_summary
    from launch.train import build
    from pretrain.config import load_config

    with resumable():
        run = load_config(config, [*(overrides or []), *([f"corpus.on_bad={on_bad.value}"] if on_bad else [])])
        if not run.corpus.sources:
            raise UserError(f"{config} has no corpus.sources to build from; give at least one, each with a path")
        console = make_console()
        manifest = build(run.corpus, console)
        console.print(corpus_summary(manifest))
        console.print(f"corpus: {run.corpus.path}", markup=False, soft_wrap=True)


@data_app.command("verify")
def data_verify(corpus: ConfigOrCorpus) -> None:
    """Check every byte of a corpus against its manifest.

    The exit code is 1 if something is missing or damaged.

    [bold]Example:[/bold] diptych data verify corpora/quickstart
    """
    from launch.local import num_cores
    from pretrain.data.manifest import MANIFEST, load_manifest

    path = _corpus_folder(corpus)
    if not (path / MANIFEST).is_file():
        load_manifest(path)
    from pretrain.data.corpus import verify_corpus

    problems = verify_corpus(path, num_cores())
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems in {path}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)
    print(f"every file of {path} is what its manifest says")


@data_app.command("show")
def data_show(corpus: ConfigOrCorpus) -> None:
    """Show what a corpus holds.

    Sources, splits, document lengths, entropy, examples.

    [bold]Example:[/bold] diptych data show corpora/quickstart
    """
    from launch.display import make_console
    from launch.tables import corpus_description
    from pretrain.data.corpus import describe_corpus

    make_console().print(corpus_description(describe_corpus(_corpus_folder(corpus))))


@data_app.command("index")
def data_index(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="Folder to make.")],
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Tars of the training split.")],
    tokenizer: Annotated[Path, typer.Option(metavar="MODEL", help="The sentencepiece model that the ids are of.")],
    valid: Annotated[list[Path] | None, typer.Option(metavar="SHARD", help="A tar to validate on. Repeatable.")] = None,
    test: Annotated[list[Path] | None, typer.Option(metavar="SHARD", help="A tar to test on. Repeatable.")] = None,
    name: Annotated[str, typer.Option(help="What the corpus calls this source.")] = "shards",
) -> None:
    """Make a corpus of WebDataset tars that hold token ids (.npy).

    The tars stay where they are. Tars of .txt or .json are sources for `data build`, which tokenizes them.

    [bold]Example:[/bold] diptych data index corpora/theirs theirs-*.tar --tokenizer their.model --valid held-out.tar
    """
    from launch.display import make_console
    from launch.tables import corpus_summary
    from pretrain.data.joining import index_shards

    parts = {"train": shards, "valid": valid or [], "test": test or []}
    make_console().print(corpus_summary(index_shards(corpus, parts, tokenizer, name)))  # type: ignore[arg-type]


@data_app.command("merge")
def data_merge(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="Folder to make.")],
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Corpora of one tokenizer and split rule.")],
) -> None:
    """Join corpora of one tokenizer.

    Shards are linked where the file system allows it. Equal documents are in one split everywhere, but not removed.

    [bold]Example:[/bold] diptych data merge corpora/all corpora/books corpora/web
    """
    from launch.display import make_console
    from launch.tables import corpus_summary
    from pretrain.data.joining import merge_corpora

    make_console().print(corpus_summary(merge_corpora(corpus, parts)))


def _corpus_folder(name: str) -> Path:
    """A folder as it is; anything else is a config, whose corpus is meant."""
    from pretrain.config import load_config

    return Path(name).absolute() if Path(name).is_dir() else load_config(name).corpus.path


@evaluate_app.command("context")
def evaluate_context(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or the path of its folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the evaluation section, for instance windows=64."),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Checkpoint to read; by default the newest.")] = None,
    split: Annotated[Split | None, typer.Option(help="Documents to read; by default as configured.")] = None,
    folder: Annotated[Path, typer.Option(help="Where runs are looked for by name.")] = Path("runs"),
) -> None:
    """Read sequences longer than those trained on.

    Writes a report with curves into the run's folder: the loss by context length, and what the context is worth.

    [bold]Example:[/bold] diptych evaluate context quickstart --split valid windows=64
    """
    from launch.display import make_console
    from launch.runs import find_run
    from launch.train import evaluate_context as evaluate_run

    run_folder = find_run(run, folder)
    changes = [*(overrides or []), *([f"split={split.value}"] if split else [])]
    changes = [f"evaluation.{change.removeprefix('evaluation.')}" for change in changes]
    with resumable():
        evaluate_run(run_folder, make_console(), step=step, overrides=changes)


@probe_app.command("argmax")
def evaluate_probe_argmax(
    attention: Annotated[
        list[Attention] | None, typer.Option(help="A kind of attention; repeatable. By default all three.")
    ] = None,
    positions: Annotated[
        list[Positions] | None, typer.Option(help="A kind of positions; repeatable. By default none and rotary.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Train each kind with the seeds 0 to N - 1.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of each training.")] = 1000,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results go.")] = Path("probes/argmax"),
) -> None:
    """Which encoders know where the largest of 64 values stands?

    Trains a small encoder of each kind and seed, and writes a table, a plot and results.json. Finished trainings are
    kept: interrupt it anywhere and run it again. About ten minutes on two cores.

    [bold]Example:[/bold] diptych evaluate probe argmax --attention dual_triangle --positions none --seeds 1
    """
    from launch.display import make_console
    from launch.probe import argmax

    kinds = dict.fromkeys(attention or Attention)
    told = dict.fromkeys(positions or (Positions.NONE, Positions.ROTARY))
    with resumable():
        argmax(out, [a.value for a in kinds], [p.value for p in told], seeds, steps, make_console())


@app.command()
def runs(
    folder: Annotated[Path, typer.Option(help="The folder of run folders.")] = Path("runs"),
) -> None:
    """List runs with their state, step and loss.

    [bold]Example:[/bold] diptych runs --folder /scratch/me/runs
    """
    from launch.display import make_console
    from launch.runs import list_runs
    from launch.tables import runs_table

    rows = list_runs(folder)
    if not rows:
        print(f"no runs in {folder.absolute()}")
        return
    make_console().print(runs_table(rows))


@model_app.command("show")
def model_show(config: Config, overrides: Overrides = None) -> None:
    """Show what a config's encoder is made of and what it costs.

    Parameters, heads, layers, and FLOPs per token; no weights are allocated.

    [bold]Example:[/bold] diptych model show model/1b corpus.tokenizer.vocab_size=32768
    """
    from launch.display import make_console
    from launch.model import show_model

    show_model(config, overrides or [], make_console())


@config_app.command("show")
def config_show(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved config as YAML.

    Includes, file, changes and defaults in one; `diptych train` reads it back as it is.

    [bold]Example:[/bold] diptych config show quickstart model.num_layers=6
    """
    from pretrain.config import load_config, to_yaml

    print(to_yaml(load_config(config, overrides or [])), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of config files, for editors.

    [bold]Example:[/bold] diptych config schema > diptych.schema.json
    """
    from pretrain.config import RunConfig

    print(json.dumps(file_schema(RunConfig), indent=2, ensure_ascii=False))


def file_schema(run_config: "type[RunConfig]") -> dict[str, object]:
    """The schema of one file: that of `RunConfig`, where `include` may give what a complete run requires."""
    schema = run_config.model_json_schema()
    schema.pop("required", None)
    schema["properties"]["include"] = {
        "type": "array",
        "items": {"type": "string"},
        "description": "Configs that this one starts from: paths from this file, or names of configs of Diptych.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


if __name__ == "__main__":
    main()
