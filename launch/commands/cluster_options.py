"""The options of `diptych submit` and `diptych sweep` that stand for keys of the config's section `cluster`."""

import inspect
import json
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

METAVARS = {
    "nodes": "N",
    "min_nodes": "N",
    "gpus_per_node": "G",
    "time": "HH:MM:SS",
    "partition": "P",
    "account": "A",
    "qos": "Q",
    "mem": "SIZE",
    "constraint": "F",
    "exclude": "NODES",
    "dependency": "D",
    "array_parallelism": "N",
    "setup": "LINE",
    "container": "IMAGE",
    "signal_delay_s": "SECONDS",
}
"""Keys that are options, and what stands for their values in the help. Their types and texts are the schema's."""
NAMES = {"partition": ("--partition", "-p"), "account": ("--account", "-A"), "signal_delay_s": ("--signal-delay",)}
"""Names of options that are not called like their keys alone."""


class ClusterCommand(TyperCommand):
    """A command with these options besides its own. Their values reach it as `context.obj`, a list of KEY=VALUE.

    The options are made when the command itself is looked at: `diptych --help` must not wait for pydantic.
    """

    def get_params(self, ctx: Any) -> Any:
        """Options and arguments, these options included."""
        if not any(parameter.name in METAVARS for parameter in self.params):
            self.params = [*self.params, *_make_options()]
        return super().get_params(ctx)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        given = {key: ctx.params.pop(key) for key in METAVARS}
        ctx.obj = [f"cluster.{key}={json.dumps(value)}" for key, value in given.items() if value not in (None, (), [])]
        return super().invoke(ctx)


def _make_options() -> list[Any]:
    """Click's options, which Typer makes of a function's signature."""
    from pretrain.config.cluster import ClusterConfig

    def options() -> None:
        pass

    options.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(key, field))
            for key, field in ClusterConfig.model_fields.items()
            if key in METAVARS
        ]
    )
    app = typer.Typer(add_completion=False)
    app.command()(options)
    return typer.main.get_command(app).params


def _annotation(key: str, field: Any) -> Any:
    """The parameter that stands for a field: its type, and the first sentence of its documentation as help."""
    repeatable = get_origin(field.annotation) is list
    kinds = (field.annotation, *get_args(field.annotation))
    kind = list[str] if repeatable else int if any(kind is int or int in get_args(kind) for kind in kinds) else str
    text = field.description.split(". ")[0].rstrip(".") + "." + " Repeatable." * repeatable
    option = typer.Option(
        *NAMES.get(key, ()), help=text, metavar=METAVARS[key], rich_help_panel="Slurm", show_default=False
    )
    return Annotated[kind | None, option]
