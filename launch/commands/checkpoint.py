"""`diptych checkpoint` and `diptych export-weights`: what a run has saved."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look at what a run has saved, verify it, thin it out.")


Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or the path of its folder.")]


Folder = Annotated[Path, typer.Option(help="Where runs are looked for by name.")]


Step = Annotated[int | None, typer.Option(min=0, help="Of which step; by default the newest.")]


@app.command("list")
def checkpoint_list(run: Run, folder: Folder = Path("runs")) -> None:
    """List a run's checkpoints.

    [bold]Example:[/bold] diptych checkpoint list quickstart
    """
    from launch.checkpoint import list_run
    from launch.runs import find_run
    from launch.terminal.console import make_console

    list_run(find_run(run, folder), make_console())


@app.command("show")
def checkpoint_show(run: Run, step: Step = None, folder: Folder = Path("runs")) -> None:
    """Show what a checkpoint holds.

    Its files with their digests, and where the run stood. It is verified first.

    [bold]Example:[/bold] diptych checkpoint show quickstart --step 800
    """
    from launch.checkpoint import show_checkpoint
    from launch.runs import find_run
    from launch.terminal.console import make_console

    show_checkpoint(find_run(run, folder), step, make_console())


@app.command("verify")
def checkpoint_verify(
    run: Run,
    step: Annotated[int | None, typer.Option(min=0, help="Only that of this step.")] = None,
    folder: Folder = Path("runs"),
) -> None:
    """Read every byte of a run's checkpoints.

    The exit code is 1 if something is missing, damaged or foreign.

    [bold]Example:[/bold] diptych checkpoint verify quickstart
    """
    from launch.checkpoint import verify_run
    from launch.runs import find_run
    from launch.terminal.console import make_console

    raise typer.Exit(verify_run(find_run(run, folder), step, make_console()))


@app.command("prune")
def checkpoint_prune(
    run: Run,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Keep so many of the newest; by default as configured.")
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option(min=0, help="Keep those whose step is a multiple of this; by default as configured."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    folder: Folder = Path("runs"),
) -> None:
    """Remove a run's old checkpoints.

    All are verified first. Damaged ones are neither counted nor removed, and the newest valid one always stays.

    [bold]Example:[/bold] diptych checkpoint prune quickstart --keep-last 1 --dry-run
    """
    from launch.checkpoint import prune_run
    from launch.runs import find_run
    from launch.terminal.console import make_console

    prune_run(find_run(run, folder), keep_last, keep_every, dry_run, make_console())


def export_weights(
    run: Run,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The safetensors file to write.")],
    step: Step = None,
    folder: Folder = Path("runs"),
) -> None:
    """Write a checkpoint's whole weights as plain safetensors.

    The encoder is built anew from them, and must give the logits that were stored when the checkpoint was saved.

    [bold]Example:[/bold] diptych export-weights quickstart --out quickstart.safetensors
    """
    from launch.checkpoint import export_run
    from launch.runs import find_run
    from launch.terminal.console import make_console

    export_run(find_run(run, folder), step, out, make_console())
