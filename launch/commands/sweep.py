"""`diptych sweep`: a grid of runs, and what came out."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import Config, Local, LocalProcesses, RunByDefault, resumable
from launch.commands.cluster_options import ClusterCommand
from launch.terminal.console import make_console, say

app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Train a grid of runs; `sweep CONFIG` is short for `sweep run CONFIG`.",
)
_Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the config; KEY=A,B,C is an axis of the grid."),
]


@app.command("run", cls=ClusterCommand)
def sweep_run(
    context: typer.Context,
    config: Config,
    changes: _Changes = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B", help="An axis of the grid; more may follow it.")
    ] = None,
    local: Local = False,
    nproc: LocalProcesses = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the members, and the scripts that would be sent to sbatch; do nothing.")
    ] = False,
    in_job: Annotated[
        bool,
        typer.Option("--in-job", help="In the script of an array: prepare this job's member, and print its folder."),
    ] = False,
) -> None:
    """Train a config on every point of a grid, or go on with it.

    The axes are those given here, and those of the config's section `sweep`. On Slurm the runs are the members of an
    array, --array-parallelism at a time. A member that fails does not stop the rest; the same command starts
    again what is not finished.

    [bold]Example:[/bold] diptych sweep run my.yaml --grid model.attention=dual_triangle,bidirectional seed=1,2,3
    """
    from launch.grid.execution import prepare_member, run_here, show_sweep, submit_sweep
    from launch.grid.members import is_axis, plan_sweep
    from launch.slurm.in_job import allocation_overrides

    overrides = [*(change for change in changes or [] if not is_axis(change)), *context.obj]
    overrides += allocation_overrides() if in_job else []
    axes = [*(grid or []), *(change for change in changes or [] if is_axis(change))]
    console = make_console()
    with resumable():
        sweep = plan_sweep(config, overrides, axes)
        if dry_run:
            show_sweep(sweep, console, local=local)
            return
        if in_job:
            folder = prepare_member(sweep, make_console(stderr=True))
            print(folder or "", end="")
            return
        sweep.write()
        if not local:
            submit_sweep(sweep, console)
            return
        exit_code = run_here(sweep, nproc, console)
    raise typer.Exit(exit_code)


@app.command("show")
def sweep_show(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's name, or the path of its folder.")],
    folder: Annotated[Path, typer.Option(help="Where sweeps are looked for by name.")] = Path("runs"),
) -> None:
    """Show what came out of a sweep: means and spreads over seeds, and a plot of all curves.

    [bold]Example:[/bold] diptych sweep show paper-text
    """
    import time

    from launch.grid.sweep_report import plot_curves, read_results, results_table

    path = folder / sweep if (folder / sweep).is_dir() else Path(sweep)
    results = read_results(path, time.time())
    console = make_console()
    console.print(results_table(path.absolute().name, results))
    say(console, f"curves: {plot_curves(path.absolute(), results)}")
