"""The watchdog: a rank that makes no progress, or is not there any more, ends the run so that it can be resumed.

The main loop notes where it is (a plain assignment). A thread in every rank writes that to a small file, and ends its
rank when the main loop has not moved for too long: all ranks wait for the silent one in a collective, so each comes
to that by itself, under any launcher. Rank 0 (or, where that is the silent one, the others) then reads all files, to
say which rank is to blame. A rank that was stopped as a whole (SIGSTOP, a suspended job) does not count that time.

    heartbeats/attempt-0002/rank-0003.json   where this rank is
    heartbeats/attempt-0002/end.txt          why this attempt ends early, once that is decided
"""

import faulthandler
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from pretrain.config.training import SupervisionConfig
from pretrain.errors import EXIT_RESUME_ME, EXIT_SUPERSEDED
from pretrain.files import replace_text
from pretrain.run.attempt import Attempt
from pretrain.training.monitor.diagnosis import diagnose, process_state, silent_ranks
from pretrain.training.monitor.heartbeats import (
    Heartbeat,
    end_of,
    heartbeat_folder,
    heartbeat_path,
    look_at,
    remove_older,
)
from pretrain.training.monitor.places import STARTING

log = logging.getLogger(__name__)
ORDERLY_S = 10.0
"""How long the main loop has to end in order (stop request, newer attempt) before the thread ends the rank."""


@dataclass(frozen=True)
class Whereabouts:
    """Place of a rank's main loop, and what follows from it."""

    step: int
    doing: str
    patient: bool
    """Whether this may take long: starting, compiling, saving."""
    unsaved: bool
    """Whether ending here would lose steps."""


class Watchdog:
    """Watch over the main loop of one rank, by a thread."""

    def __init__(
        self,
        attempt: Attempt,
        rank: int,
        world_size: int,
        limits: SupervisionConfig,
        stop_requested: Callable[[], bool],
        on_hang: Callable[[str], None],
    ) -> None:
        """Begin to watch, in the place "starting".

        Args:
            attempt: start of the run that this rank belongs to.
            rank: number of this process.
            world_size: number of ranks.
            limits: how long the main loop may stay in one place.
            stop_requested: tells whether a signal asked for the end.
            on_hang: told the diagnosis, on one rank that can still tell it to others.
        """
        self._attempt, self._rank, self._world_size = attempt, rank, world_size
        self._limits, self._stop_requested, self._on_hang = limits, stop_requested, on_hang
        self._tick_s = min(max(limits.silence_s / 20, 0.2), 10.0)
        self._folder = heartbeat_folder(attempt)
        self._place = Whereabouts(0, STARTING.doing, patient=True, unsaved=False)
        self._stopped = threading.Event()
        if rank == 0:
            remove_older(attempt)
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def note(self, step: int, doing: str, *, patient: bool = False, unsaved: bool = True) -> None:
        """The main loop is now at this place; called several times a step."""
        self._place = Whereabouts(step, doing, patient, unsaved)

    def stop(self) -> None:
        """The main loop has ended."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seen, still_s, asked_s, superseded_s = self._place, 0.0, 0.0, 0.0
        last = time.monotonic()
        while not self._stopped.wait(self._tick_s):
            now = time.monotonic()
            # Of a longer gap this process has slept the most, and so could not have moved.
            passed, last = min(now - last, 2 * self._tick_s), now
            place = self._place
            moved, seen = place is not seen, place
            still_s = 0.0 if moved else still_s + passed
            asked_s = asked_s + passed if self._stop_requested() and not moved and not place.unsaved else 0.0
            limit_s = self._limits.long_silence_s if place.patient else self._limits.silence_s
            self._arm(limit_s)
            self._write(place, still_s)
            if still_s >= limit_s:
                self._hang(place, still_s)
                return
            if asked_s >= ORDERLY_S:
                self._end_early(f"stopped while {place.doing}, with nothing to save", EXIT_RESUME_ME)
                return
            superseded_s = superseded_s + passed if self._is_superseded() and not moved else 0.0
            if superseded_s >= ORDERLY_S:
                log.error("a newer attempt has taken the run over while this rank was %s; it ends", place.doing)
                self._exit(EXIT_SUPERSEDED)
                return

    def _arm(self, limit_s: float) -> None:
        """Have a thread of C end the process if this one does not run for so long: a library that keeps the GIL."""
        faulthandler.dump_traceback_later(limit_s + 60, exit=True, file=2)

    def _write(self, place: Whereabouts, still_s: float) -> None:
        beat = Heartbeat(self._rank, os.uname().nodename, os.getpid(), place.step, place.doing, round(still_s, 1))
        with suppress(OSError):
            replace_text(heartbeat_path(self._attempt, self._rank), json.dumps(asdict(beat)))

    def _is_superseded(self) -> bool:
        try:
            return self._attempt.superseded_by() is not None
        except OSError:
            return False

    def _hang(self, place: Whereabouts, still_s: float) -> None:
        """Say where everything stands, wake who sleeps so that it can say too, and end."""
        log.error("no progress for %.0f s: this rank is %s, step %d", still_s, place.doing, place.step)
        faulthandler.dump_traceback(all_threads=True, file=2)
        sightings = look_at(self._attempt, range(self._world_size))
        if self._rank == 0 or 0 in silent_ranks(sightings, 1, self._tick_s):
            report = diagnose(sightings, self._world_size, self._tick_s)
            log.error("%s", report)
            self._tell(report)
            _wake([sightings[rank].heartbeat for rank in silent_ranks(sightings, self._world_size, self._tick_s)])
        # The others come to the same within a few ticks, and shall not take this rank's end for a failure.
        time.sleep(4 * self._tick_s)
        self._exit(EXIT_RESUME_ME)

    def _end_early(self, why: str, code: int) -> None:
        log.error("%s", why)
        if end_of(self._attempt) is None:
            self._tell(why)
        self._exit(code)

    def _tell(self, why: str) -> None:
        with suppress(OSError):
            replace_text(self._folder / "end.txt", why)
            self._on_hang(why)

    def _exit(self, code: int) -> None:
        logging.shutdown()
        os._exit(code)


def _wake(beats: list[Heartbeat]) -> None:
    """Have stopped ranks of this machine write their stack traces; they end with the others then."""
    for beat in beats:
        if beat.host == os.uname().nodename and process_state(beat.pid) == "is stopped (SIGSTOP)":
            with suppress(OSError):
                os.kill(beat.pid, signal.SIGQUIT)  # faulthandler's, see __main__.py
                os.kill(beat.pid, signal.SIGCONT)
