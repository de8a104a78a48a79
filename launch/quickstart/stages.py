"""`diptych quickstart`: real documents, corpus, training, context report, each stage resumed where it was interrupted.

The stages themselves are those of `diptych train`; only the documents are the quickstart's own.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from launch.evaluate import evaluate_context
from launch.local.ranks import num_cores, num_gpus
from launch.pipeline import train_and_evaluate
from launch.preparation import ensure_corpus
from launch.quickstart.documentation import collect_documentation
from launch.show.corpus import corpus_summary
from launch.terminal.console import clock, make_console, say
from launch.terminal.progress import StageProgress
from pretrain.config.load import config_folder, load_config
from pretrain.config.run import RunConfig
from pretrain.config.topology import check_topology
from pretrain.data.manifest import MANIFEST
from pretrain.errors import EXIT_DONE, UserError
from pretrain.evaluation.context.request import Request
from pretrain.files import sha256_of
from pretrain.run.folder import RunFolder


def run_quickstart(overrides: Sequence[str]) -> int:
    """Go the whole road in the working directory; returns the exit code."""
    config = load_config(str(config_folder() / "quickstart.yaml"), overrides)
    num_ranks = min(2, num_gpus() or num_cores())
    check_topology(config, num_ranks)
    console = make_console()
    started = time.monotonic()
    say(console, "Diptych quickstart: from raw documents to a context report. Interrupt it whenever you like.")

    corpus_is_built = (config.corpus.path / MANIFEST).is_file()
    with _stage(console, 1, "Collect documents: the documentation inside the installed Python packages"):
        if corpus_is_built:
            say(console, "  not needed: the corpus is built already")
        else:
            _collect(config, console)
    with _stage(console, 2, "Build the corpus: train a tokenizer, split, encode, write shards"):
        manifest = ensure_corpus(config.corpus, console)
        if corpus_is_built:
            say(console, f"  it is built already, in {config.corpus.path}")
        console.print(corpus_summary(manifest))
    with _stage(console, 3, f"Train a dual-triangle encoder on {num_ranks} processes"):
        exit_code = train_and_evaluate(config, num_ranks, console, evaluate=False)
        if exit_code != EXIT_DONE:
            return exit_code
    with _stage(console, 4, "Evaluate context extension: rows longer than any it was trained on"):
        evaluate_context(Request(config.run_folder), console)
    say(console, f"\nThe whole road took {clock(time.monotonic() - started)}.", "bold")
    _say_what_next(config, console)
    return EXIT_DONE


@contextmanager
def _stage(console: Console, number: int, title: str) -> Iterator[None]:
    """Announce a stage, and say how long it took if it was completed."""
    say(console, f"\n[{number}/4] {title}", "bold")
    started = time.monotonic()
    yield
    say(console, f"  {clock(time.monotonic() - started)} min", "dim")


def _collect(config: RunConfig, console: Console) -> None:
    if len(config.corpus.sources) != 1:
        raise UserError("the quickstart writes its own documents; for other corpus.sources use `diptych train CONFIG`")
    target = Path(config.corpus.sources[0].path).absolute()
    with StageProgress(console) as progress:
        collected = collect_documentation(target, progress.report)
    state = "" if collected else " (there already)"
    say(console, f"  {target}{state}, {target.stat().st_size / 1e6:.1f} MB, sha256 {sha256_of(target)[:12]}")


def _say_what_next(config: RunConfig, console: Console) -> None:
    """Print where everything lies, and commands to go on with."""
    say(console, "\nWhere everything lies", "bold")
    run = RunFolder.of(config)
    for what, path in (
        ("corpus", config.corpus.path),
        ("run", run.path),
        ("checkpoints", run.checkpoints),
        ("report", run.evaluation),
    ):
        say(console, f"  {what:<12} {path}")
    diptych = _command("diptych")
    where = [] if config.corpus.path == Path("corpora/quickstart").absolute() else [f"corpus.path={config.corpus.path}"]
    say(console, "\nWhat to try next", "bold")
    for why, command in (
        ("look at the curves", [_command("tensorboard"), "--logdir", str(run.tensorboard)]),
        ("evaluate on other documents", [diptych, "evaluate", "context", str(run), "--split", "valid"]),
        (
            "compare with an ordinary bidirectional encoder",
            [diptych, "quickstart", "name=bidirectional", "model.attention=bidirectional", *where],
        ),
        ("see every setting", [diptych, "config", "show", "quickstart"]),
        (
            "train on your own text (a folder of .txt files, or .jsonl)",
            [diptych, "train", "quickstart", "name=mine", "corpus.path=corpora/mine", "corpus.sources=[{path: TEXTS}]"],
        ),
    ):
        say(console, f"  {why}:")
        say(console, f"    {shlex.join(command)}")


def _command(name: str) -> str:
    """How to call a program of this environment: by its name where the shell finds it, else by its path."""
    beside = Path(sys.executable).parent / name
    return name if shutil.which(name) or not beside.exists() else str(beside)
