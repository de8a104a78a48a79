"""How a training or a long stage looks to a person: a calm bar on a terminal, a few plain lines elsewhere.

What is shown comes from outside (`Status`, or a stage's counts); nothing here reads files or starts processes.
"""

import os
import time
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from launch.runs import compact
from pretrain.status import Status

PLAIN_INTERVAL_S = 3.0
STAGE_INTERVAL_S = 10.0
"""Without a terminal, a stage that tells its speed prints a line so often."""
PLAIN_LINES = 50
"""Without a terminal, a run prints a progress line at most so often, however long it takes."""


class _PatientConsole(Console):
    """Falls silent when nobody reads its pipe any more; rich's own would end the training."""

    def on_broken_pipe(self) -> None:
        """Send the rest to /dev/null, also what Python flushes at its exit."""
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def make_console(stderr: bool = False) -> Console:
    """A console that does not fold lines at 80 characters when its output goes to a file or a pipe."""
    console = _PatientConsole(highlight=False, stderr=stderr)
    return console if console.is_terminal else _PatientConsole(highlight=False, width=140, stderr=stderr)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` as it is. A terminal that is gone does not end the training."""
    with suppress(OSError):
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Seconds as 2:05 or 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


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
    """Where the time goes, and the memory, one phrase each; a share that rounds to nothing is left out."""
    shares = (status.time_shares or {}).items()
    phrases = [f"{name.replace('_', '+')} {share:.0%}" for name, share in shares if share >= 0.005]
    if status.peak_memory_bytes is not None:
        planned = status.planned_memory_bytes
        plan = "" if planned is None else f" (plan {planned / 2**30:.3g})"
        phrases.append(f"memory {status.peak_memory_bytes / 2**30:.3g} GiB{plan}")
    return phrases


class Display(Protocol):
    """Where a launch shows its ranks' progress; entered for as long as they run."""

    def __enter__(self) -> Self:
        """Begin to draw."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing and leave the last state on the screen."""
        ...

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
        """Draw the bar."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
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
        """Print nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Print the last step, if it was held back."""
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


class StageProgress:
    """Progress of named stages, one after the other: a bar each, or in a file a line each, and one now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("  {task.description}", table_column=Column(min_width=16)),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._start: tuple[float, int, int] = (0.0, 0, 0)
        """Of the stage at hand: when it began, and with how many bytes and documents."""
        self._said_at = 0.0

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bars as they stand."""
        if kind is None:
            self._complete_stages()
        with suppress(OSError):
            self._progress.stop()

    def report(self, stage: str, done: int, total: int) -> None:
        """Say that `done` of `total` units of `stage` are done; a total of 0 is not known."""
        self._begin(stage, f" ({_grouped(total)})" if total > 1 else "")
        counts = f"{_grouped(done)} of {_grouped(total)}" if total > 1 else (_grouped(done) if done > 1 else "")
        self._progress.update(self._tasks[stage], completed=done, total=total or None, counts=counts)

    def report_text(self, stage: str, done: int, total: int, documents: int) -> None:
        """The same of bytes of text, with their documents, 0 where these are not counted; tells their speeds."""
        now = time.monotonic()
        if self._begin(stage, f" ({total / 1e6:,.1f} MB)" if total > 1 else ""):
            self._start, self._said_at = (now, done, documents), now
        began, bytes_before, documents_before = self._start
        seconds = max(now - began, 1e-3)
        counts = f"{done / 1e6:,.1f}" + (f" of {total / 1e6:,.1f} MB" if total > 1 else " MB") if done or total else ""
        if documents > documents_before:
            counts += (
                f", {(done - bytes_before) / 1e6 / seconds:,.1f} MB/s, "
                f"{(documents - documents_before) / seconds:,.0f} documents/s"
            )
        self._progress.update(self._tasks[stage], completed=done, total=total or None, counts=counts)
        if not self._console.is_terminal and done != total and now - self._said_at >= STAGE_INTERVAL_S:
            self._said_at = now
            left = clock((total - done) * seconds / (done - bytes_before)) if total and done > bytes_before else ""
            say(self._console, f"  {stage}: {counts}" + (f", {left} left" if left else ""))

    def _begin(self, stage: str, size: str) -> bool:
        """Whether the stage was not known before."""
        if stage in self._tasks:
            return False
        self._complete_stages()
        self._tasks[stage] = self._progress.add_task(stage, counts="")
        if not self._console.is_terminal:
            say(self._console, f"  {stage}{size}")
        return True

    def _complete_stages(self) -> None:
        """A stage whose total was never known is done when the next begins."""
        for task in self._progress.tasks:
            if task.total is None:
                self._progress.update(task.id, total=task.completed or 1, completed=task.completed or 1)


def _grouped(count: int) -> str:
    return f"{count:,}" if count < 100_000 else compact(count)
