"""`diptych model`: look at an encoder before it is trained."""

import typer

from launch.commands.arguments import Config, Overrides
from launch.terminal.console import make_console

app = typer.Typer(no_args_is_help=True, help="Look at an encoder before it is trained.")


@app.command("show")
def model_show(config: Config, overrides: Overrides = None) -> None:
    """Show what a config's encoder is made of and what it costs.

    Parameters, heads, layers, and FLOPs per token; no weights are allocated.

    [bold]Example:[/bold] diptych model show model/1b corpus.tokenizer.vocab_size=32768
    """
    from launch.show.encoder import show_model

    show_model(config, overrides or [], make_console())
