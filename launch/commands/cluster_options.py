"""The options of `diptych submit` and `diptych sweep` that stand for keys of the config's section `cluster`."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer


def _option(help_text: str, *names: str, metavar: str) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar, rich_help_panel="Slurm", show_default=False)


Nodes = Annotated[int | None, _option("Nodes to train on.", metavar="N")]


MinNodes = Annotated[int | None, _option("Start, and go on, with as few nodes as this.", metavar="N")]


GpusPerNode = Annotated[int | None, _option("GPUs of each node, a rank for each.", metavar="G")]


Time = Annotated[str | None, _option("Time limit of one start.", metavar="HH:MM:SS")]


Partition = Annotated[str | None, _option("Partition.", "--partition", "-p", metavar="P")]


Account = Annotated[str | None, _option("Account to charge.", "--account", "-A", metavar="A")]


Qos = Annotated[str | None, _option("Quality of service.", metavar="Q")]


Mem = Annotated[str | None, _option("Memory of each node, for instance 64G.", metavar="SIZE")]


Constraint = Annotated[str | None, _option("Features that nodes must have.", metavar="F")]


Exclude = Annotated[str | None, _option("Nodes to stay away from.", metavar="NODES")]


Dependency = Annotated[str | None, _option("When to start, for instance afterok:12.", metavar="D")]


ArrayParallelism = Annotated[int | None, _option("Members of a sweep that train at the same time.", metavar="N")]


Setup = Annotated[list[str] | None, _option("Shell to run first. Repeatable.", metavar="LINE")]


Container = Annotated[str | None, _option("Image to run the ranks in.", metavar="IMAGE")]


SignalDelay = Annotated[
    int | None, _option("Save so many seconds before the time limit.", "--signal-delay", metavar="SECONDS")
]


def cluster_overrides(given: Mapping[str, Any]) -> list[str]:
    """KEY=VALUE changes for those of a command's parameters that are keys of the section `cluster` and were given."""
    from pretrain.config.cluster import ClusterConfig

    keys = ClusterConfig.model_fields
    return [f"cluster.{key}={json.dumps(value)}" for key, value in given.items() if key in keys and value is not None]
