"""`diptych train` and `diptych quickstart`: from a config to a trained, evaluated encoder on this machine."""

from typing import Annotated

import typer

from launch.commands.arguments import Config, Overrides, ProfileOption, resumable
from launch.terminal.console import make_console


def quickstart(overrides: Overrides = None) -> None:
    """Go from documents to a context report in minutes.

    Collects the documentation of the installed Python packages, builds a corpus, trains an encoder of a million
    parameters and evaluates it. Works in the current folder (corpora/ and runs/). Interrupt it anywhere and run it
    again: it goes on.

    [bold]Example:[/bold] diptych quickstart training.tokens=1000000
    """
    from launch.quickstart.stages import run_quickstart

    with resumable():
        exit_code = run_quickstart(overrides or [])
    raise typer.Exit(exit_code)


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
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse to resume from an older checkpoint if a newer one is damaged.")
    ] = False,
    profile: ProfileOption = None,
    evaluate: Annotated[bool, typer.Option(help="Write the context report at the end.")] = True,
) -> None:
    """Train a config on this machine, or resume it.

    Builds the corpus first if it is not there. Ctrl-C saves and ends (exit code 75); the same command resumes.

    [bold]Example:[/bold] diptych train my.yaml --nproc 2 name=first training.tokens=1000000
    """
    from launch.pipeline import choose_num_ranks, train_and_evaluate
    from pretrain.config.load import load_config
    from pretrain.training.monitor.profiled_steps import ProfiledSteps

    with resumable():
        steps = ProfiledSteps.parse(profile) if profile is not None else None
        run = load_config(config, [*(overrides or []), *(["checkpoint.strict=true"] if strict else [])])
        num_ranks = choose_num_ranks(run, nproc)
        exit_code = train_and_evaluate(
            run, num_ranks, make_console(), allow_change=allow_change or [], evaluate=evaluate, profile=steps
        )
    raise typer.Exit(exit_code)
