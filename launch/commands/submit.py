"""`diptych submit`: queue a run on a Slurm cluster."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import Config, Overrides, ProfileOption
from launch.terminal.console import make_console


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
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Resume although KEY changed, which makes it another run. Repeatable."),
    ] = None,
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
