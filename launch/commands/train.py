"""`diptych train`, `quickstart` and `submit`: from a config to a trained, evaluated encoder, here or on Slurm."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import AllowChange, Config, Overrides, ProfileOption, resumable
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
    allow_change: AllowChange = None,
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


def submit(
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Print the scripts that would be sent to sbatch; do nothing.")] = False,
    queue: Annotated[
        bool, typer.Option(help="--no-queue prepares the run and its scripts, prints their folder, and queues nothing.")
    ] = True,
    in_job: Annotated[
        bool,
        typer.Option("--in-job", help="In a job's own script: prepare the run for that job, and print its folder."),
    ] = False,
    evaluate: Annotated[bool, typer.Option(help="Evaluate in a job of its own after the training.")] = True,
    allow_change: AllowChange = None,
    profile: ProfileOption = None,
) -> None:
    """Queue a config on a Slurm cluster, or its continuation.

    The job runs code and config as they are now. It saves before its time limit and when it is preempted, queues
    itself again and resumes; the evaluation follows in a job of its own. The options stand for the keys of the
    config's section `cluster`.

    [bold]Example:[/bold] diptych submit my.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu
    """
    from launch.slurm.in_job import allocation_overrides, prepare_run
    from launch.slurm.queueing import queue_run
    from launch.slurm.scripts import show_scripts
    from pretrain.config.load import load_config
    from pretrain.config.topology import check_cluster_ranks
    from pretrain.training.monitor.profiled_steps import ProfiledSteps

    steps = ProfiledSteps.parse(profile) if profile is not None else None
    run = load_config(config, [*(overrides or []), *context.obj, *(allocation_overrides() if in_job else [])])
    if dry_run:
        check_cluster_ranks(run)
        show_scripts(run, make_console(), folder=run.run_folder, name=run.name, evaluate=evaluate)
        return
    # Where a script reads the folder's name, nothing else is in its way.
    console = make_console(stderr=in_job or not queue)
    folder: Path | None
    if in_job:
        folder = prepare_run(run, console, allow_change or [], profile=steps)
    else:
        changed = allow_change or []
        folder = queue_run(run, console, evaluate=evaluate, queue=queue, allow_change=changed, profile=steps)
    if folder and (in_job or not queue):
        print(folder)
