"""Arguments that several commands take, how their values are read, and how a resumable command is interrupted."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pretrain.errors import EXIT_RESUME_ME, UserError

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
Local = Annotated[bool, typer.Option("--local", help="Train here, one after another, instead of on Slurm.")]
LocalProcesses = Annotated[
    int | None, typer.Option("--nproc", min=1, metavar="N", help="With --local: processes of each run.")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Resume although KEY changed, which makes it another run. Repeatable."),
]
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


def parse_lengths(text: str) -> list[float]:
    """Read `--lengths`: `0.5x,1x,2x` as numbers.

    Raises:
        UserError: anything else.
    """
    try:
        lengths = [float(word.strip().lower().removesuffix("x")) for word in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or not all(0 < length < float("inf") for length in lengths):
        raise UserError(f"--lengths {text!r} is not a list of multiples of the training length; write 0.5x,1x,2x,4x")
    return lengths


def parse_count(text: str) -> int:
    """Read `--recalibrate`: `2M`, `500k` or `300_000` as a number of tokens.

    Raises:
        UserError: anything else.
    """
    count = _with_unit(text, {"k": 1e3, "m": 1e6, "g": 1e9})
    if not 1 <= count < float("inf"):
        raise UserError(f"--recalibrate {text!r} is not a number of tokens; write 500k, 2M or 300000")
    return round(count)


def parse_duration(text: str) -> float:
    """Read `--budget` of an evaluation: `90s`, `10m` or `1h` in seconds; a bare number is in seconds.

    Raises:
        UserError: anything else.
    """
    seconds = _with_unit(text, {"s": 1.0, "m": 60.0, "h": 3600.0})
    if not 0 < seconds < float("inf"):
        raise UserError(f"--budget {text!r} is not a time; write 90s, 10m or 1h")
    return seconds


def parse_flops(text: str) -> float:
    """Read `--budget` of a ladder: a number of FLOPs such as 2e15.

    Raises:
        UserError: it is none, or not above zero.
    """
    value = _with_unit(text, {})
    if not 0 < value < float("inf"):
        raise UserError(f"--budget {text}: not a number of FLOPs, for instance 2e15")
    return value


def parse_seeds(text: str) -> list[int]:
    """Read `--seeds`: whole numbers, each once.

    Raises:
        UserError: it is not a list of whole numbers.
    """
    try:
        return list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise UserError(f"--seeds {text}: not whole numbers with commas between them, for instance 1,2,3") from None


def _with_unit(text: str, units: Mapping[str, float]) -> float:
    """A number with one of the units behind it, or none; 0 if it is no number."""
    unit = units.get(text[-1:].lower())
    try:
        return float(text) if unit is None else float(text[:-1]) * unit
    except ValueError:
        return 0.0
