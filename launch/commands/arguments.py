"""Arguments that several commands take, and how a command that can be resumed is interrupted."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pretrain.errors import EXIT_RESUME_ME

Config = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a config that comes with Diptych: quickstart."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the config, for instance training.tokens=1000000."),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or the path of its folder.")]
RunsFolder = Annotated[Path, typer.Option("--folder", help="Where runs are looked for by name.")]
ProfileOption = Annotated[
    str | None,
    typer.Option(metavar="N:M", help="Record steps N to M with torch's profiler, in the run's folder profile/."),
]


class RunByDefault(TyperGroup):
    """Group of commands such as `sweep`, whose `run` may be left out: `diptych sweep CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in where it was left out."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 inside: say how to go on, and exit with 75."""
    process = os.getpid()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != process:
            # A forked worker, which has inherited this handler.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        raise typer.Exit(EXIT_RESUME_ME) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
