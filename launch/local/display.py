"""How a training or a long stage looks to a person: a calm bar on a terminal, a few plain lines elsewhere.

What is shown comes from outside (`Status`, or a stage's counts); nothing here reads files or starts processes.
"""

import time
from contextlib import suppress
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from launch.terminal.console import clock, compact, say
from pretrain.run.status import Status

PLAIN_INTERVAL_S = 3.0
PLAIN_LINES = 50
"""Most progress lines that a run prints where there is no terminal, however long it takes."""


def tokens_done(status: Status) -> str:
    """How far the run is."""
    return f"{compact(status.tokens)} of {compact(status.total_tokens)} tokens"


def time_left(status: Status) -> str:
    """How long it will take from here; empty while that is not known."""
    return "" if status.seconds_left is None else f"{clock(status.seconds_left)} left"


def numbers(status: Status) -> list[str]:
    """What a status measures, one phrase each; a value that is not known yet is left out."""
    phrases = [f"step {status.step}"]
    if status.skipped_steps:
        phrases.append(f"{status.skipped_steps} skipped")
    if status.loss is not None:
        phrases.append(f"loss {status.loss:.3f}")
    if status.masked_accuracy is not None:
        phrases.append(f"masked accuracy {status.masked_accuracy:.1%}")
    if status.tokens_per_s is not None:
        phrases.append(f"{compact(status.tokens_per_s)} tokens/s")
    if status.mfu is not None:
        phrases.append(f"{status.mfu:.1%} MFU")
    elif status.flops_per_s is not None:
        phrases.append(f"{compact(status.flops_per_s, ' ')}FLOP/s")
    return phrases


def costs(status: Status) -> list[str]:
    """Shares of the time, and the memory, one phrase each; a share that rounds to nothing is left out."""
    shares = (status.time_shares or {}).items()
    phrases = [f"{name.replace('_', '+')} {share:.0%}" for name, share in shares if share >= 0.005]
    if status.peak_memory_bytes is not None:
        planned = status.planned_memory_bytes
        plan = "" if planned is None else f" (plan {planned / 2**30:.3g})"
        phrases.append(f"memory {status.peak_memory_bytes / 2**30:.3g} GiB{plan}")
    return phrases


class Display(Protocol):
    """Place where a launch shows its ranks' progress; entered for as long as they run."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def message(self, text: str, style: str | None = None) -> None:
        """Print a line that stays."""
        ...

    def update(self, status: Status) -> None:
        """Show the newest status."""
        ...


class TerminalDisplay:
    """One bar, a line of numbers under it, and one of what they cost."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.fields[extent]}"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("starting", total=None, extent="")
        self._numbers = Text("starting the ranks", style="dim")
        self._costs = Text(style="dim")
        self._live = Live(Group(self._progress, self._numbers, self._costs), console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._progress.finished and self._progress.tasks[0].total is None:
            self._progress.update(self._task, total=1, completed=0)
        with suppress(OSError):
            self._live.stop()

    def message(self, text: str, style: str | None = None) -> None:
        """Print a line above the bar."""
        say(self._console, text, style)

    def update(self, status: Status) -> None:
        """Move the bar."""
        self._progress.update(
            self._task,
            description=status.state,
            total=status.total_tokens or None,
            completed=status.tokens,
            extent="  ".join(filter(None, [tokens_done(status), time_left(status)])),
        )
        self._numbers.plain = " · ".join(numbers(status))
        self._costs.plain = " · ".join(costs(status))


class PlainDisplay:
    """Progress lines for a file or a pipe: never more than `PLAIN_LINES` + 2, however long the run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: Status | None = None
        self._shown_at = -PLAIN_INTERVAL_S
        self._latest: Status | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._latest is not None and (self._shown is None or self._latest.step != self._shown.step):
            self._show(self._latest)

    def message(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        say(self._console, text, style)

    def update(self, status: Status) -> None:
        """Print a line if there is a new step, a few seconds have passed and the run has moved on by a share."""
        if status.loss is None:
            return
        self._latest = status
        if time.monotonic() - self._shown_at < PLAIN_INTERVAL_S:
            return
        if self._shown is None or status.tokens - self._shown.tokens >= status.total_tokens / PLAIN_LINES:
            self._show(status)

    def _show(self, status: Status) -> None:
        step, *measured = numbers(status)
        say(self._console, " | ".join(filter(None, [step, tokens_done(status), *measured, time_left(status)])))
        self._shown, self._shown_at = status, time.monotonic()


def make_display(console: Console) -> Display:
    """The display that suits where the console writes to."""
    return TerminalDisplay(console) if console.is_terminal else PlainDisplay(console)
