"""`diptych checkpoint` and `diptych export-weights`: what a run has saved."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import RunName, RunsFolder
from launch.terminal.console import make_console

app = typer.Typer(no_args_is_help=True, help="Look at what a run has saved, verify it, thin it out.")
Step = Annotated[int | None, typer.Option(min=0, help="Of which step; by default the newest.")]


@app.command("list")
def checkpoint_list(run: RunName, folder: RunsFolder = Path("runs")) -> None:
    """List a run's checkpoints.

    [bold]Example:[/bold] diptych checkpoint list quickstart
    """
    from launch.run_list import find_run
    from launch.saved import list_run

    list_run(find_run(run, folder), make_console())


@app.command("show")
def checkpoint_show(run: RunName, step: Step = None, folder: RunsFolder = Path("runs")) -> None:
    """Show what a checkpoint holds.

    Its files with their digests, and where the run stood. It is verified first.

    [bold]Example:[/bold] diptych checkpoint show quickstart --step 800
    """
    from launch.run_list import find_run
    from launch.saved import show_checkpoint

    show_checkpoint(find_run(run, folder), step, make_console())


@app.command("verify")
def checkpoint_verify(
    run: RunName,
    step: Annotated[int | None, typer.Option(min=0, help="Only that of this step.")] = None,
    folder: RunsFolder = Path("runs"),
) -> None:
    """Read every byte of a run's checkpoints.

    The exit code is 1 if something is missing, damaged or foreign.

    [bold]Example:[/bold] diptych checkpoint verify quickstart
    """
    from launch.run_list import find_run
    from launch.saved import verify_run

    raise typer.Exit(verify_run(find_run(run, folder), step, make_console()))


@app.command("prune")
def checkpoint_prune(
    run: RunName,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Keep so many of the newest; by default as configured.")
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option(min=0, help="Keep those whose step is a multiple of this; by default as configured."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    folder: RunsFolder = Path("runs"),
) -> None:
    """Remove a run's old checkpoints.

    All are verified first. Damaged ones are neither counted nor removed, and the newest valid one always stays.

    [bold]Example:[/bold] diptych checkpoint prune quickstart --keep-last 1 --dry-run
    """
    from launch.run_list import find_run
    from launch.saved import prune_run

    prune_run(find_run(run, folder), keep_last, keep_every, dry_run, make_console())


def export_weights(
    run: RunName,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The safetensors file to write.")],
    step: Step = None,
    folder: RunsFolder = Path("runs"),
) -> None:
    """Write a checkpoint's whole weights as plain safetensors.

    The encoder is built anew from them, and must give the logits that were stored when the checkpoint was saved.

    [bold]Example:[/bold] diptych export-weights quickstart --out quickstart.safetensors
    """
    from launch.run_list import find_run
    from launch.saved import export_run

    export_run(find_run(run, folder), step, out, make_console())
