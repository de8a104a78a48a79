"""`diptych compare`: the context reports of several runs in one."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import RunsFolder
from launch.terminal.console import make_console, say


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Names or folders of runs, or folders that hold runs.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the comparison goes.")] = Path("comparison"),
    evaluation: Annotated[
        str, typer.Option(metavar="NAME", help="Which report of each run: the folder's name in its evaluation/.")
    ] = "context",
    folder: RunsFolder = Path("runs"),
) -> None:
    """Compare the context reports of several runs.

    Writes compare.html and compare.md: loss and gain by context length. Runs that differ in nothing but their seed are
    averaged. A folder of runs, such as a sweep's, stands for all runs in it that have a report.

    [bold]Example:[/bold] diptych compare quickstart bidirectional --out comparison
    """
    from launch.run_list import runs_meant
    from launch.terminal.tables import table
    from pretrain.evaluation.report.compare import comparison_table, read_run_kinds, write_comparison

    console, found = make_console(), []
    for name in runs:
        meant = runs_meant([name], folder)
        written = [run for run in meant if run.report(evaluation).is_file()]
        # Of a sweep, what there is so far; of a run that is named, an error.
        if len(written) < len(meant) and written:
            say(console, f"{name}: {len(meant) - len(written)} of {len(meant)} runs have no report, and are left out")
        found += written or meant
    kinds = read_run_kinds(found, evaluation)
    write_comparison(out, kinds)
    numbers = comparison_table(kinds)
    compared = table("Context extension compared", numbers.header, numbers.texts)
    compared.columns[0].no_wrap = True
    console.print(compared)
    say(console, f"comparison: {(out / 'compare.html').absolute()}, compare.md")
