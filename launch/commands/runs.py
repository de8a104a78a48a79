"""`diptych runs`: what became of the runs in a folder."""

from pathlib import Path
from typing import Annotated

import typer


def runs(
    folder: Annotated[Path, typer.Option(help="The folder of run folders.")] = Path("runs"),
) -> None:
    """List runs with their state, step and loss.

    [bold]Example:[/bold] diptych runs --folder /scratch/me/runs
    """
    from launch.display import make_console
    from launch.runs import list_runs
    from launch.tables import runs_table

    rows = list_runs(folder)
    if not rows:
        print(f"no runs in {folder.absolute()}")
        return
    make_console().print(runs_table(rows))
