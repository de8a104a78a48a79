"""`diptych config`: look at configs and their schema."""

import json
from typing import TYPE_CHECKING

import typer

from launch.commands.arguments import Config, Overrides

if TYPE_CHECKING:
    from pretrain.config.run import RunConfig

app = typer.Typer(no_args_is_help=True, help="Look at configs and their schema.")


@app.command("show")
def config_show(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved config as YAML.

    Includes, file, changes and defaults in one; `diptych train` reads it back as it is.

    [bold]Example:[/bold] diptych config show quickstart model.num_layers=6
    """
    from pretrain.config.load import load_config, to_yaml

    print(to_yaml(load_config(config, overrides or [])), end="")


@app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of config files, for editors.

    [bold]Example:[/bold] diptych config schema > diptych.schema.json
    """
    from pretrain.config.run import RunConfig

    print(json.dumps(file_schema(RunConfig), indent=2, ensure_ascii=False))


def file_schema(run_config: "type[RunConfig]") -> dict[str, object]:
    """The schema of one file: that of `RunConfig`, where `include` may give what a complete run requires."""
    schema = run_config.model_json_schema()
    schema.pop("required", None)
    schema["properties"]["include"] = {
        "type": "array",
        "items": {"type": "string"},
        "description": "Configs that this one starts from: paths from this file, or names of configs of Diptych.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
