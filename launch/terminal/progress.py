"""The progress of a long stage."""

import time
from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from launch.terminal.console import clock, compact, say

STAGE_INTERVAL_S = 10.0
"""Seconds between two lines of a stage that tells its speed, where there is no terminal."""


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
        """Beginning of the stage at hand: when, and with how many bytes and documents."""
        self._said_at = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
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
