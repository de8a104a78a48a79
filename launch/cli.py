"""The command line `diptych`, put together from `commands/`. What a command does lives in the modules it calls.

Those are imported inside the commands: `--help` must not wait for torch.
"""

import sys
from typing import Annotated

import typer

from launch.commands import checkpoint, config, data, evaluate, ladder, plan, runs, sweep, train
from launch.commands.cluster_options import ClusterCommand
from pretrain import __version__
from pretrain.errors import EXIT_WRONG_INPUT, UserError
from pretrain.redaction import redact

app = typer.Typer(
    name="diptych",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]diptych quickstart[/bold]. "
    "Exit codes: 0 done, 2 your input is wrong, 75 run the same command again to resume, 1 anything else.",
)
app.command()(train.quickstart)
app.command()(train.train)
app.command(cls=ClusterCommand)(train.submit)
app.command()(runs.runs)
app.command()(plan.plan)
app.command()(evaluate.compare)
app.command()(runs.logs)
app.command()(runs.cancel)
app.command()(runs.resume)
app.add_typer(sweep.app, name="sweep")
app.add_typer(ladder.app, name="ladder")
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(checkpoint.app, name="checkpoint")
app.command("export-weights")(checkpoint.export_weights)
app.add_typer(config.app, name="config")
app.add_typer(plan.model_app, name="model")


def main() -> None:
    """Entry point of the `diptych` command."""
    try:
        app(prog_name="diptych")
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        sys.exit(EXIT_WRONG_INPUT)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"diptych {__version__}")
        raise typer.Exit


@app.callback()
def diptych(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Pretrain dual-triangle encoders: from raw text or proteins to a trained encoder and its context report."""


if __name__ == "__main__":
    main()
