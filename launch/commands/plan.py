"""`diptych model` and `plan`: an encoder before it is trained, and what a run needs before it is paid for."""

from typing import Annotated

import typer

from launch.commands.arguments import Config, Overrides
from launch.terminal.console import make_console

model_app = typer.Typer(no_args_is_help=True, help="Look at an encoder before it is trained.")


@model_app.command("show")
def model_show(config: Config, overrides: Overrides = None) -> None:
    """Show what a config's encoder is made of and what it costs.

    Parameters, heads, layers, and FLOPs per token; no weights are allocated.

    [bold]Example:[/bold] diptych model show model/1b corpus.tokenizer.vocab_size=32768
    """
    from launch.show.encoder import show_model

    show_model(config, overrides or [], make_console())


def plan(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, metavar="G", help="Ranks on each, one to a device.")] = 1,
    gpu: Annotated[
        str, typer.Option(metavar="h200|h100|a100|cpu|GIB", help="The device of a rank, or its memory in GiB.")
    ] = "h200",
    mfu: Annotated[
        float | None, typer.Option(min=0.001, max=1.0, metavar="SHARE", help="Of the peak that training reaches.")
    ] = None,
    peak: Annotated[
        float | None, typer.Option(min=0.001, metavar="TFLOPS", help="Dense bf16 peak of a device that is not known.")
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="Three lines, as in the comments of configs/model/.")] = False,
) -> None:
    """Tell what a run needs, what fits, and how long it takes.

    Memory of a rank for every sharding, activation checkpointing and micro-batch; FLOPs, tokens per second, days, and
    what to change where nothing fits. Nothing is allocated.

    [bold]Example:[/bold] diptych plan model/1b data.sequence_length=4096 --gpu h100 --gpus-per-node 8
    """
    from launch.show.memory_plan import brief_plan, hardware, plan_for, show_plan

    made = plan_for(config, overrides or [], hardware(gpu, nodes, gpus_per_node, peak))
    if brief:
        print("\n".join(brief_plan(made)))
    else:
        show_plan(made, mfu, make_console())
