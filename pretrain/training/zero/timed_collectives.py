"""DeepSpeed's collectives, each within a section of somebody's clock."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

OpenSection = Callable[[str], AbstractContextManager[None]]
COLLECTIVES = (
    "all_gather",
    "all_gather_base",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
"""Methods of DeepSpeed's communication backend."""


class _TimedWork:
    """A collective that was started; waiting for it is communication."""

    def __init__(self, work: Any, section: OpenSection) -> None:
        self._work, self._section = work, section

    def wait(self, *arguments: Any) -> Any:
        """Wait until it is done."""
        with self._section("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _timed(method: Callable[..., Any], section: OpenSection, *arguments: Any, **named: Any) -> Any:
    with section("communication"):
        work = method(*arguments, **named)
    return _TimedWork(work, section) if hasattr(work, "wait") else work


def time_collectives(backend: Any, section: OpenSection) -> None:
    """Open `section("communication")` while the host is in a collective of DeepSpeed's backend, or waits for one.

    On a CPU, that is how long the training waits for communication. A section that was there before is replaced.
    """
    for name in COLLECTIVES:
        if (method := getattr(type(backend), name, None)) is not None:
            setattr(backend, name, partial(_timed, method.__get__(backend), section))
