"""`diptych ladder`: one recipe at several sizes, and what the next size would come to."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import (
    Config,
    Local,
    LocalProcesses,
    Overrides,
    RunByDefault,
    parse_flops,
    parse_seeds,
    resumable,
)
from launch.terminal.console import make_console, say

app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Train a config at several sizes and predict the next; `ladder CONFIG` is short for `ladder run CONFIG`.",
)
_Budget = Annotated[
    float | None,
    typer.Option(metavar="FLOPS", parser=parse_flops, help="Of all trainings together, for instance 2e15."),
]


@app.command("run")
def ladder_run(
    config: Config,
    changes: Overrides = None,
    sizes: Annotated[
        str, typer.Option(metavar="A,B,C", help="Sizes of configs/model/, or config files that set one.")
    ] = "1m,4m,15m",
    seeds: Annotated[str, typer.Option(metavar="A,B", help="Train every size with each of these.")] = "1",
    budget: _Budget = None,
    tokens_per_parameter: Annotated[
        float, typer.Option(min=0, metavar="T", help="How long, where there is no --budget.")
    ] = 20.0,
    local: Local = False,
    nproc: LocalProcesses = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained; do nothing.")] = False,
) -> None:
    """Train a config at several sizes, each on as many tokens per parameter, and predict the next size's loss.

    A ladder is a sweep: runs in a folder of its own, trained here or as a Slurm array; the same command goes on with
    it. Where the sizes share no learning rate of their own, use model.parametrization=mup.

    [bold]Example:[/bold] diptych ladder books name=books-ladder --sizes 1m,4m,15m --budget 5e15 --local
    """
    from launch.grid.execution import run_here, show_sweep, submit_sweep
    from launch.grid.ladder_report import plan_table
    from launch.grid.rungs import plan_ladder

    console = make_console()
    with resumable():
        sweep, ladder = plan_ladder(
            config,
            changes or [],
            sizes.split(","),
            seeds=parse_seeds(seeds),
            tokens_per_parameter=tokens_per_parameter,
            budget=budget,
        )
        console.print(plan_table(sweep.name, ladder))
        if dry_run:
            show_sweep(sweep, console, local=local)
            return
        sweep.write()
        ladder.write(sweep.folder)
        if not local:
            submit_sweep(sweep, console)
            say(console, f"afterwards: `diptych ladder show {sweep.name}`")
            return
        exit_code = run_here(sweep, nproc, console)
    if exit_code == 0:
        _show(sweep.folder)
    raise typer.Exit(exit_code)


@app.command("show")
def ladder_show(
    ladder: Annotated[str, typer.Argument(metavar="LADDER", help="A ladder's name, or the path of its folder.")],
    folder: Annotated[Path, typer.Option(help="Where ladders are looked for by name.")] = Path("runs"),
) -> None:
    """Fit the law to the runs that are finished, check it on the largest size, and predict the next.

    [bold]Example:[/bold] diptych ladder show books-ladder
    """
    from pretrain.errors import UserError

    path = next((path for path in (folder / ladder, Path(ladder)) if path.is_dir()), None)
    if path is None:
        raise UserError(f"no ladder {ladder!r}: neither a folder nor a name in {folder.absolute()}")
    _show(path.absolute())


def _show(folder: Path) -> None:
    import time

    from launch.grid.ladder_report import findings, read_climbed, rungs_table, write_report

    climbed, console = read_climbed(folder, time.time()), make_console()
    console.print(rungs_table(climbed))
    for line in findings(climbed):
        say(console, line)
    say(console, f"report: {write_report(folder, climbed)}")
