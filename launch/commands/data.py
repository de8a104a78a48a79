"""`diptych data`: build, verify and look at a corpus."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.commands.arguments import Config, Overrides, resumable
from launch.terminal.console import make_console
from pretrain.errors import EXIT_FAILED, UserError
from pretrain.files import disk_errors

app = typer.Typer(no_args_is_help=True, help="Build, verify and look at a corpus.")
_AGAIN = "free space, delete what was made there, and run the same command again"
ConfigOrCorpus = Annotated[
    str, typer.Argument(metavar="CONFIG_OR_CORPUS", help="A config, or a corpus folder (with a manifest.json).")
]


@app.command("build")
def data_build(
    config: Config,
    overrides: Overrides = None,
    on_bad: Annotated[
        Literal["error", "skip"] | None,
        typer.Option(help="A record that cannot be read: stop and name it, or skip and count it."),
    ] = None,
    parts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="In parts, on several machines; without --part, join them.")
    ] = None,
    part: Annotated[int | None, typer.Option(min=0, metavar="K", help="The part to build, of 0 to N - 1.")] = None,
) -> None:
    """Build a config's corpus.

    Trains the tokenizer, splits the documents, writes shards and the manifest. Can be interrupted and run again.

    [bold]Example:[/bold] diptych data build my.yaml corpus.processes=8 --on-bad skip
    """
    from launch.preparation import build
    from launch.show.corpus import corpus_summary
    from pretrain.config.load import load_config

    with resumable():
        run = load_config(config, [*(overrides or []), *([f"corpus.on_bad={on_bad}"] if on_bad else [])])
        if not run.corpus.sources:
            raise UserError(f"{config} has no corpus.sources to build from; give at least one, each with a path")
        if part is not None and parts is None:
            raise UserError("--part says which part, but not of how many: add --parts N")
        console = make_console()
        manifest = build(run.corpus, console, part, parts)
        console.print(corpus_summary(manifest))
        console.print(f"corpus: {run.corpus.path}", markup=False, soft_wrap=True)


@app.command("verify")
def data_verify(corpus: ConfigOrCorpus) -> None:
    """Check every byte of a corpus against its manifest.

    The exit code is 1 if something is missing or damaged.

    [bold]Example:[/bold] diptych data verify corpora/quickstart
    """
    from launch.local.ranks import num_cores
    from pretrain.data.manifest import MANIFEST, load_manifest

    path = _corpus_folder(corpus)
    if not (path / MANIFEST).is_file():
        load_manifest(path)
    from pretrain.data.inspection import verify_corpus

    problems = verify_corpus(path, num_cores())
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems in {path}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)
    print(f"every file of {path} is what its manifest says")


@app.command("show")
def data_show(corpus: ConfigOrCorpus) -> None:
    """Show what a corpus holds.

    Sources, splits, document lengths, entropy, examples.

    [bold]Example:[/bold] diptych data show corpora/quickstart
    """
    from launch.show.corpus import corpus_description
    from pretrain.data.inspection import describe_corpus

    make_console().print(corpus_description(describe_corpus(_corpus_folder(corpus))))


@app.command("index")
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
    from launch.show.corpus import corpus_summary
    from pretrain.data.build.foreign import index_shards

    parts = {"train": shards, "valid": valid or [], "test": test or []}
    with disk_errors(corpus, _AGAIN):
        made = index_shards(corpus, parts, tokenizer, name)  # type: ignore[arg-type]
    make_console().print(corpus_summary(made))


@app.command("merge")
def data_merge(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="Folder to make.")],
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Corpora of one tokenizer and split rule.")],
) -> None:
    """Join corpora of one tokenizer.

    Shards are linked where the file system allows it. Equal documents are in one split everywhere, but not removed.

    [bold]Example:[/bold] diptych data merge corpora/all corpora/books corpora/web
    """
    from launch.show.corpus import corpus_summary
    from pretrain.data.build.joining import merge_corpora

    with disk_errors(corpus, _AGAIN):
        made = merge_corpora(corpus, parts)
    make_console().print(corpus_summary(made))


def _corpus_folder(name: str) -> Path:
    """A folder as it is; anything else is a config, whose corpus is meant."""
    from pretrain.config.load import find_config, load_config

    if Path(name).is_dir():
        return Path(name).absolute()
    try:
        find_config(name)
    except UserError as error:
        raise UserError(f"{Path(name).absolute()} is no corpus: there is no such folder; and {error}") from None
    return load_config(name).corpus.path
