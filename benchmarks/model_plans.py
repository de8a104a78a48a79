"""The plans in the comments of `configs/model/`: `python -m benchmarks.model_plans` writes them anew (seconds).

Each size names its own command (`# $ diptych plan ...`); what it prints follows, as comments. A test compares both.
"""

import shlex
from pathlib import Path

from typer.testing import CliRunner

from launch.cli import app
from pretrain.config.load import config_folder
from pretrain.files import write_text

COMMAND = "# $ diptych "


def sizes() -> list[Path]:
    """The files that have a plan."""
    return sorted(path for path in (config_folder() / "model").glob("*.yaml") if COMMAND in path.read_text("utf-8"))


def with_plan(text: str) -> str:
    """A file's text with the plan that its command prints now.

    Raises:
        RuntimeError: the command fails.
    """
    lines = text.splitlines()
    command = next(number for number, line in enumerate(lines) if line.startswith(COMMAND))
    after = next(number for number, line in enumerate(lines) if number > command and not line.startswith("#"))
    result = CliRunner().invoke(app, shlex.split(lines[command].removeprefix(COMMAND)))
    if result.exit_code:
        raise RuntimeError(f"{lines[command]}: {result.output or result.exception}")
    plan = [f"# {line}" for line in result.stdout.splitlines()]
    return "\n".join([*lines[: command + 1], *plan, *lines[after:]]) + "\n"


if __name__ == "__main__":
    for size in sizes():
        write_text(size, with_plan(size.read_text("utf-8")))
        print(size)
