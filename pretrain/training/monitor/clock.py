"""Where the time of a step goes, on one rank, without a wait for the device that would not be there anyway."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch


class Stopwatch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


SECTIONS = ("data", "forward", "backward", "optimizer", "communication", "saving", "validation")
"""What the time is divided into; what is in none of them is `other`."""
ON_DEVICE = ("forward", "backward", "optimizer")
"""What a GPU does while the host runs ahead."""


@dataclass(frozen=True)
class Timing:
    """Seconds since the timing before, and what they were spent on."""

    elapsed: float
    """Seconds in all."""
    seconds: tuple[float, ...]
    """Seconds in each of SECTIONS."""
    on_gpu: bool = False

    @property
    def own(self) -> float:
        """Seconds that the rank spent by itself, not waiting for others: reading rows, and its forward passes."""
        return self.seconds[SECTIONS.index("data")] + self.seconds[SECTIONS.index("forward")]


class StepClock:
    """Charges each moment to the innermost section that it is in.

    On a GPU the sections of the device are measured by events, which are read when the steps are over. There
    collectives run beside the computation, and how much of them it waits for is not known: they are not taken apart.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marked = False
        """Whether sections are named in a profiler's trace."""
        self._thread = threading.get_ident()
        self._within: list[str] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = dict.fromkeys((*SECTIONS, "other"), 0.0)
        self._began = self._charged = time.perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What happens inside is of this section; another thread's is not counted."""
        if threading.get_ident() != self._thread:
            yield
            return
        with torch.profiler.record_function(name) if self.marked else nullcontext():
            if self.on_gpu and name in ON_DEVICE:
                with self._by_events(name):
                    yield
                return
            self._charge()
            self._within.append(name)
            try:
                yield
            finally:
                self._charge()
                self._within.pop()

    @contextmanager
    def _by_events(self, name: str) -> Iterator[None]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def _charge(self) -> None:
        now = time.perf_counter()
        self._seconds[self._within[-1] if self._within else "other"] += now - self._charged
        self._charged = now

    def take(self) -> Timing:
        """All since the last call. On a GPU it waits for the last step."""
        if self._events:
            self._events[-1][2].synchronize()
        self._charge()
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        timing = Timing(self._charged - self._began, tuple(self._seconds[name] for name in SECTIONS), self.on_gpu)
        self._seconds, self._events = dict.fromkeys(self._seconds, 0.0), []
        self._began = self._charged
        return timing


def shares(timings: Sequence[Timing]) -> dict[str, float]:
    """Shares of the ranks' time by section, and `other`: together one. Forward and backward passes are one section."""
    seconds = {name: sum(timing.seconds[k] for timing in timings) for k, name in enumerate(SECTIONS)}
    parts = {
        "data": seconds["data"],
        "forward_backward": seconds["forward"] + seconds["backward"],
        "communication": seconds["communication"],
        "optimizer": seconds["optimizer"],
        "saving": seconds["saving"],
        "validation": seconds["validation"],
    }
    if timings[0].on_gpu:
        # Only what the hosts agree on is known, which would be taken for the whole.
        del parts["communication"]
    # A host may read rows while its GPU still moves the weights.
    whole = max(sum(timing.elapsed for timing in timings), sum(parts.values()), 1e-9)
    parts["other"] = whole - sum(parts.values())
    return {name: round(part / whole, 4) for name, part in parts.items()}
