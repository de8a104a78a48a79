"""A training on the ranks of this machine, from their start to what their end means for the run."""

from collections.abc import Mapping, Sequence

from launch.local.display import Display
from launch.local.ranks import Rank, rank_command
from launch.local.supervisor import PATIENCE, Patience, run_ranks
from pretrain.config.run import RunConfig
from pretrain.errors import EXIT_DONE, EXIT_RESUME_ME
from pretrain.run.attempt import ATTEMPT_VARIABLE, Attempt, take_attempt
from pretrain.run.folder import RunFolder
from pretrain.run.status import LIVE_STATES
from pretrain.training.monitor.heartbeats import end_of


class StatusFeed:
    """Passes what rank 0 writes to status.json on to the display: each event once, nothing of an earlier attempt."""

    def __init__(self, attempt: Attempt, display: Display) -> None:
        self._attempt, self._display = attempt, display
        self._modified_ns = 0
        self._events = 0

    def refresh(self) -> None:
        """Show what is new since the last call."""
        try:
            modified_ns = self._attempt.run.status_file.stat().st_mtime_ns
        except OSError:
            return
        if modified_ns == self._modified_ns:
            return
        self._modified_ns = modified_ns
        status = self._attempt.run.status()
        if status is None or status.attempt != self._attempt.number:
            return
        for event in status.events[max(self._events - status.events_before, 0) :]:
            self._display.message(event)
        self._events = max(self._events, status.events_before + len(status.events))
        self._display.update(status)


def launch_local(
    config: RunConfig,
    num_ranks: int,
    display: Display,
    environment: Mapping[str, str] | None = None,
    patience: Patience = PATIENCE,
) -> int:
    """Train on `num_ranks` processes of this machine; must be called from the main thread.

    `environment` holds variables for the ranks, besides those of this process.

    Returns:
        0: the run is done; 75: it was asked to stop, has saved and can be resumed; 2: a rank found the user's input
        wrong; 1: anything else. No rank is left running in any case.
    """
    run = RunFolder.of(config)
    attempt = take_attempt(run)
    variables = {**(environment or {}), ATTEMPT_VARIABLE: str(attempt.number)}
    feed = StatusFeed(attempt, display)
    end = run_ranks(
        rank_command(run),
        num_ranks,
        attempt.log,
        display,
        feed.refresh,
        variables=variables,
        attempt=attempt,
        patience=patience,
    )
    _close_status(attempt, end.exit_code, end.failed)
    if end.exit_code == EXIT_RESUME_ME:
        status = run.status()
        where = f" from {status.checkpoint}" if status and status.checkpoint else ""
        display.message(f"interrupted; run the same command again to resume{where}")
    return end.exit_code


def _close_status(attempt: Attempt, exit_code: int, failed: Sequence[Rank]) -> None:
    """Say in the status that the run has ended, where the ranks had no time to say it."""
    status = attempt.run.status()
    if status is None or status.state not in LIVE_STATES or exit_code == EXIT_DONE or attempt.superseded_by():
        return
    status.state = "interrupted" if exit_code == EXIT_RESUME_ME or not failed else "failed"
    status.message = end_of(attempt)
    if failed:
        status.message = f"rank {failed[0].number} {failed[0].how_it_ended()}"
    attempt.run.write_status(status)
