"""DeepSpeed's collectives, with their time charged to a clock."""

from collections.abc import Callable
from functools import partial
from typing import Any

from pretrain.training.monitor.clock import StepClock

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

    def __init__(self, work: Any, clock: StepClock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *arguments: Any) -> Any:
        """Until it is done."""
        with self._clock.section("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _timed(method: Callable[..., Any], clock: StepClock, *arguments: Any, **named: Any) -> Any:
    with clock.section("communication"):
        work = method(*arguments, **named)
    return _TimedWork(work, clock) if hasattr(work, "wait") else work


def time_collectives(backend: Any, clock: StepClock) -> None:
    """Let a clock know how long the host is in the collectives of DeepSpeed's backend, and waits for them.

    On a CPU, that is how long the training waits for communication. A clock that was there before is replaced.
    """
    for name in COLLECTIVES:
        if (method := getattr(type(backend), name, None)) is not None:
            setattr(backend, name, partial(_timed, method.__get__(backend), clock))
