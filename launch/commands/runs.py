"""`diptych runs`, `logs`, `cancel`, `resume`: what became of runs, and what is to become of them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import RunName, RunsFolder, resumable
from launch.terminal.console import make_console, say


def runs(
    folder: Annotated[Path, typer.Option(help="The folder of run folders.")] = Path("runs"),
) -> None:
    """List runs with their state, step and loss.

    The state is what the run itself wrote last, with a heartbeat; beside it stands what Slurm says of its job.

    [bold]Example:[/bold] diptych runs --folder /scratch/me/runs
    """
    from launch.run_list import list_runs, runs_table, why_ended, with_slurm

    rows, warning = with_slurm(list_runs(folder))
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    if not rows:
        print(f"no runs in {folder.absolute()}")
        return
    console = make_console()
    if not console.is_terminal:
        console.width = 200
    console.print(runs_table(rows), soft_wrap=False)
    for line in why_ended(rows):
        say(console, line)


def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    rank: Annotated[int, typer.Option(min=0, metavar="R", help="Whose output.")] = 0,
    folder: RunsFolder = Path("runs"),
) -> None:
    """Print what a rank of the newest start prints, here or on Slurm.

    [bold]Example:[/bold] diptych logs mine -f --rank 3
    """
    from launch.logs import show_log
    from launch.run_list import find_run

    try:
        show_log(find_run(run, folder), rank, follow)
    except (KeyboardInterrupt, BrokenPipeError):
        raise typer.Exit from None


def cancel(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, or a sweep: all its members. Name or folder.")],
    folder: RunsFolder = Path("runs"),
) -> None:
    """End a run, or every run of a sweep, here or on Slurm; each saves first.

    What waits of it in Slurm's queue, its evaluation too, is taken out.

    [bold]Example:[/bold] diptych cancel mine
    """
    from launch.control import cancel_runs
    from launch.run_list import runs_meant

    cancel_runs(runs_meant([run], folder), make_console())


def resume(run: RunName, folder: RunsFolder = Path("runs")) -> None:
    """Start a run again, with the config it has, where it was: here or on Slurm.

    On Slurm it runs the code as it is now.

    [bold]Example:[/bold] diptych resume mine
    """
    from launch.control import resume_run
    from launch.run_list import find_run

    with resumable():
        exit_code = resume_run(find_run(run, folder), make_console())
    raise typer.Exit(exit_code)
