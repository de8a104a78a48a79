"""`diptych compare`: the context reports of several runs in one."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Names or folders of runs, or folders that hold runs.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the comparison goes.")] = Path("comparison"),
    evaluation: Annotated[
        str, typer.Option(metavar="NAME", help="Which report of each run: the folder's name in its evaluation/.")
    ] = "context",
    folder: Annotated[Path, typer.Option(help="Where runs are looked for by name.")] = Path("runs"),
) -> None:
    """Compare the context reports of several runs.

    Writes compare.html and compare.md: loss and gain by context length. Runs that differ in nothing but their seed are
    averaged. A folder of runs, such as a sweep's, stands for all runs in it.

    [bold]Example:[/bold] diptych compare quickstart bidirectional --out comparison
    """
    from launch.display import make_console, say
    from launch.runs import runs_meant
    from launch.tables import table
    from pretrain.evaluation.compare import read_groups, table_rows, write_comparison

    groups = read_groups(runs_meant(runs, folder), evaluation)
    write_comparison(out, groups)
    console = make_console()
    header, rows = table_rows(groups)
    console.print(table("Context extension compared", header, rows))
    say(console, f"comparison: {(out / 'compare.html').absolute()}, compare.md")
