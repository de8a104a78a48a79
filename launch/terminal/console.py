"""Consoles, and the words and numbers on them."""

import math
import os
from contextlib import suppress

from rich.console import Console


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


def duration(seconds: float) -> str:
    """A time span in its two largest units: 42 s, 5 m, 3 h 20 m, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} m"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} m"
    return f"{minutes // 1440} d {minutes // 60 % 24} h"


def compact(value: float, gap: str = "") -> str:
    """A count with three figures and a unit prefix, `gap` between them: 987, 12.3k, 3.50M, 62.1G."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            scaled = value / size
            decimals = max(0, 2 - int(math.log10(max(scaled, 1.0))))
            return f"{scaled:.{decimals}f}{gap}{unit}"
    return f"{value:.0f}{gap}"
