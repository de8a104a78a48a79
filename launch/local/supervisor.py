"""Our own supervision of the ranks of one machine: start them, watch them, end them together.

Each rank is a process group of its own, so the terminal's Ctrl-C reaches only the launcher, which forwards it as
SIGTERM. A rank asks the kernel to kill it (SIGKILL) when the launcher dies: a rank without its supervisor could hang
in a collective for ever, or write to the run folder beside the launch that follows; checkpoints survive a SIGKILL.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.local.display import Display
from launch.local.ranks import Rank, free_port, num_gpus, rank_environment, start_rank
from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUME_ME, EXIT_SUPERSEDED, EXIT_WRONG_INPUT
from pretrain.run.attempt import Attempt
from pretrain.training.monitor.heartbeats import end_of

TELLING = (EXIT_SUPERSEDED, EXIT_WRONG_INPUT)
"""Exit codes of a rank that say why the launch ends, whatever the other ranks say."""


@dataclass(frozen=True)
class Patience:
    """How long a launch waits, in seconds."""

    poll_s: float = 0.1
    """Time between two looks at the ranks."""
    failure_s: float = 4.0
    """Time that the other ranks have to end when one has died: they are likely stuck in a collective with it."""
    save_s: float = 300.0
    """Time that the ranks have to finish their step and save."""
    repeat_s: float = 0.5
    """Two SIGINTs closer than this are one Ctrl-C, which a wrapper forwarded a second time."""


PATIENCE = Patience()


class StopRequests:
    """The signals that ask the launch to end: how many, and whether it is to be at once."""

    def __init__(self, repeat_s: float = PATIENCE.repeat_s) -> None:
        self._repeat_s = repeat_s
        self.requested = False
        self.at_once = False
        self._first_at = 0.0

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler: only sets flags."""
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first_at = True, now
        elif number == signal.SIGINT and now - self._first_at > self._repeat_s:
            self.at_once = True


@contextmanager
def stop_requests(repeat_s: float = PATIENCE.repeat_s) -> Iterator[StopRequests]:
    """Take the signals that mean "end": SIGINT, SIGTERM, SIGUSR1, SIGUSR2, and SIGHUP unless under nohup."""
    requests = StopRequests(repeat_s)
    taken = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        taken.append(signal.SIGHUP)
    before = {number: signal.signal(number, requests.receive) for number in taken}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Supervisor:
    """Watches ranks until all have ended, and decides what their end means."""

    def __init__(
        self,
        ranks: Sequence[Rank],
        requests: StopRequests,
        display: Display,
        attempt: Attempt | None = None,
        patience: Patience = PATIENCE,
    ) -> None:
        """`attempt` is the one that the ranks' watchdogs may end; None for ranks that have none."""
        self._ranks, self._requests, self._display, self._attempt = ranks, requests, display, attempt
        self._patience = patience
        self._deadline = float("inf")
        self._stopping = False
        self._killed = False
        self.failed: list[Rank] = []
        """Ranks that ended in error by themselves, the first to be blamed first."""

    def watch(self, refresh: Callable[[], None]) -> int:
        """Return the launch's exit code when no rank is running any more; `refresh` is called between looks."""
        while any(rank.exit_code is None for rank in self._ranks):
            self._look_at_ranks()
            self._look_at_requests()
            if time.monotonic() > self._deadline:
                self._kill()
            refresh()
            time.sleep(self._patience.poll_s)
        return self._exit_code()

    def _look_at_ranks(self) -> None:
        ended = [rank for rank in self._ranks if rank.poll()]
        if not ended:
            return
        expected = {EXIT_DONE, EXIT_RESUME_ME, *([-signal.SIGTERM] if self._stopping else [])}
        wrong = [rank for rank in ended if rank.exit_code not in expected]
        if wrong and not self.failed and not self._killed:
            self.failed = sorted(wrong, key=lambda rank: (rank.exit_code not in TELLING, rank.exit_code or 0))
            self._end_within(self._patience.failure_s)
            for rank in self._ranks:
                rank.terminate()
        elif any(rank.exit_code == -signal.SIGTERM for rank in ended) or self._ended_by_watchdog():
            # One ended before it could handle the signal, so there is nothing to save and the others wait in vain; or
            # the watchdog ended one because of another that will not end by itself.
            self._end_within(self._patience.failure_s)
        else:
            self._end_within(self._patience.save_s)

    def _look_at_requests(self) -> None:
        if self._requests.at_once and not self._killed:
            self._display.message("stopping at once; the steps since the last checkpoint are lost", "yellow")
            self._kill()
        elif self._requests.requested and not self._stopping:
            self._stopping = True
            self._display.message("finishing the step and saving; press Ctrl-C again to stop at once", "yellow")
            self._end_within(self._patience.save_s)
            for rank in self._ranks:
                rank.terminate()

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _kill(self) -> None:
        late = [rank for rank in self._ranks if rank.exit_code is None]
        if late and not self.failed and not self._requests.at_once and not self._ended_early():
            names = ", ".join(str(rank.number) for rank in late)
            self._display.message(f"killed rank {names}: it did not end in time", "yellow")
        self._killed = True
        for rank in late:
            rank.kill()

    def _ended_early(self) -> bool:
        return self._stopping and any(rank.exit_code == -signal.SIGTERM for rank in self._ranks)

    def _ended_by_watchdog(self) -> bool:
        return self._attempt is not None and end_of(self._attempt) is not None

    def _exit_code(self) -> int:
        codes = {rank.exit_code for rank in self._ranks}
        if self.failed:
            wrong_input = any(rank.exit_code == EXIT_WRONG_INPUT for rank in self.failed)
            return EXIT_WRONG_INPUT if wrong_input else EXIT_FAILED
        if codes == {EXIT_DONE}:
            return EXIT_DONE
        if self._ended_by_watchdog() and not self._requests.at_once:
            return EXIT_RESUME_ME
        if self._requests.at_once or (self._killed and not self._ended_early()):
            return EXIT_FAILED
        return EXIT_RESUME_ME


@dataclass(frozen=True)
class RanksEnd:
    """How a launch's ranks ended."""

    exit_code: int
    failed: list[Rank]
    """Ranks that ended in error by themselves, the first to be blamed first."""
    was_asked_to_stop: bool


def run_ranks(
    command: Sequence[str],
    num_ranks: int,
    log: Callable[[int], Path],
    display: Display,
    refresh: Callable[[], None],
    *,
    variables: Mapping[str, str] | None = None,
    attempt: Attempt | None = None,
    patience: Patience = PATIENCE,
) -> RanksEnd:
    """Start ranks on this machine, watch them until all have ended, and show the last lines of one that failed.

    No rank is left running in any case. Must be called from the main thread, which takes the signals.

    Args:
        command: of every rank.
        num_ranks: how many.
        log: the file of each rank's output.
        display: entered for as long as they run.
        refresh: called between looks, and once when they have ended.
        variables: of the ranks' environment, besides those of this process.
        attempt: the one that the ranks' watchdogs may end; None for ranks that have none.
        patience: how long to wait for them.
    """
    log(0).parent.mkdir(parents=True, exist_ok=True)
    inherited, port, gpus = {**os.environ, **(variables or {})}, free_port(), num_gpus()
    ranks: list[Rank] = []
    with stop_requests(patience.repeat_s) as requests, display:
        try:
            for number in range(num_ranks):
                environment = rank_environment(number, num_ranks, port, gpus, inherited)
                ranks.append(start_rank(command, environment, log(number)))
            supervisor = Supervisor(ranks, requests, display, attempt, patience)
            exit_code = supervisor.watch(refresh)
        finally:
            for rank in ranks:
                rank.kill()
        refresh()
    for rank in supervisor.failed[:1]:
        display.message(f"rank {rank.number} {rank.how_it_ended()}; its last lines:", "bold red")
        for line in rank.log_tail():
            display.message(f"  {line}")
        display.message(f"the whole log: {rank.log}")
    return RanksEnd(exit_code, supervisor.failed, requests.requested)
