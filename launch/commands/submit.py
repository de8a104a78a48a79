"""`diptych submit`: queue a run on a Slurm cluster."""

import json
from typing import Annotated, Any

import typer

from launch.commands.arguments import Config, Overrides

_CLUSTER = "Slurm"


def _option(help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar, rich_help_panel=_CLUSTER, show_default=False)


def submit(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Print the scripts that would be sent to sbatch; do nothing.")] = False,
    queue: Annotated[
        bool, typer.Option(help="--no-queue prepares the run and its scripts, prints their folder, and queues nothing.")
    ] = True,
    evaluate: Annotated[bool, typer.Option(help="Evaluate in a job of its own after the training.")] = True,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Resume although KEY changed, which makes it another run. Repeatable."),
    ] = None,
    nodes: Annotated[int | None, _option("Nodes to train on.", metavar="N")] = None,
    min_nodes: Annotated[int | None, _option("Start, and go on, with as few nodes as this.", metavar="N")] = None,
    gpus_per_node: Annotated[int | None, _option("GPUs of each node, a rank for each.", metavar="G")] = None,
    time: Annotated[str | None, _option("Time limit of one start.", metavar="HH:MM:SS")] = None,
    partition: Annotated[str | None, _option("Partition.", "--partition", "-p", metavar="P")] = None,
    account: Annotated[str | None, _option("Account to charge.", "--account", "-A", metavar="A")] = None,
    qos: Annotated[str | None, _option("Quality of service.", metavar="Q")] = None,
    mem: Annotated[str | None, _option("Memory of each node, for instance 64G.", metavar="SIZE")] = None,
    constraint: Annotated[str | None, _option("Features that nodes must have.", metavar="F")] = None,
    exclude: Annotated[str | None, _option("Nodes to stay away from.", metavar="NODES")] = None,
    dependency: Annotated[str | None, _option("When to start, for instance afterok:12.", metavar="D")] = None,
    setup: Annotated[list[str] | None, _option("Shell to run first. Repeatable.", metavar="LINE")] = None,
    container: Annotated[str | None, _option("Image to run the ranks in.", metavar="IMAGE")] = None,
    signal_delay: Annotated[
        int | None, _option("Save so many seconds before the time limit.", metavar="SECONDS")
    ] = None,
) -> None:
    """Queue a config on a Slurm cluster, or its continuation.

    The job runs code and config as they are now. It saves before its time limit and when it is preempted, queues
    itself again and resumes; the evaluation follows in a job of its own. The options stand for the keys of the
    config's section `cluster`.

    [bold]Example:[/bold] diptych submit my.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu
    """
    from launch.display import make_console
    from launch.submit import show_scripts
    from launch.submit import submit as submit_run
    from pretrain.config import load_config

    given = {
        "nodes": nodes,
        "min_nodes": min_nodes,
        "gpus_per_node": gpus_per_node,
        "time": time,
        "partition": partition,
        "account": account,
        "qos": qos,
        "mem": mem,
        "constraint": constraint,
        "exclude": exclude,
        "dependency": dependency,
        "setup": setup,
        "container": container,
        "signal_delay_s": signal_delay,
    }
    run = load_config(config, [*(overrides or []), *cluster_overrides(given)])
    console = make_console()
    if dry_run:
        show_scripts(run, console, evaluate=evaluate)
        return
    folder = submit_run(run, console, evaluate=evaluate, queue=queue, allow_change=allow_change or [])
    if not queue:
        print(folder)


def cluster_overrides(given: dict[str, Any]) -> list[str]:
    """KEY=VALUE changes for the options of the section `cluster` that were given."""
    return [f"cluster.{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
