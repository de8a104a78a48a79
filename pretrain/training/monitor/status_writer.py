"""What others see of a run while it runs: status.json and the events in it, written by rank 0 alone."""

import logging
import time
from typing import Any

from pretrain.checkpoint.format import TrainingState
from pretrain.redaction import redact
from pretrain.run.attempt import Attempt
from pretrain.run.status import Status
from pretrain.training.monitor.heartbeats import end_of

log = logging.getLogger(__name__)
FIGURES = (
    "loss",
    "masked_accuracy",
    "learning_rate",
    "tokens_per_s",
    "flops_per_s",
    "mfu",
    "time_shares",
    "peak_memory_bytes",
    "planned_memory_bytes",
)
"""Figures of the status that stand in the metrics under the same names."""


class StatusWriter:
    """Writer of status.json; silent once another attempt has the run, or the watchdog has ended this one."""

    def __init__(self, attempt: Attempt, rank: int, world_size: int, total_tokens: int) -> None:
        self._attempt, self._rank = attempt, rank
        self.samples_lost = 0
        """Samples lost in damaged shards, as far as it was told."""
        self.status = Status(heartbeat=time.time(), total_tokens=total_tokens, attempt=attempt.number, ranks=world_size)

    def go_on_from(self, before: Status) -> None:
        """Keep the figures of an earlier start, which ended at the step where this one goes on."""
        for key in (*FIGURES, "validation_loss", "validation_step"):
            setattr(self.status, key, getattr(before, key))

    def event(self, text: str) -> None:
        """Write a line about something that happened to this rank's log, and keep it for the status."""
        log.info(text)
        self.status.add_event(redact(text))

    def show(self, doing: str, state: TrainingState, trouble: str | None) -> None:
        """Write where the run stands: one of the states of `Status`, the training state, and what is wrong."""
        status = self.status
        status.state, status.step, status.tokens, status.message = doing, state.step, state.tokens_seen, trouble
        status.skipped_steps = state.step - state.optimizer_steps
        self._write()

    def take_figures(self, record: dict[str, Any]) -> None:
        """Copy figures from the newest record of the metrics, to be written with the next `show`."""
        status = self.status
        for key in FIGURES:
            setattr(status, key, record.get(key))
        status.seconds_left = max(status.total_tokens - record["tokens"], 0) / record["tokens_per_s"]

    def samples_lost_by(self, step: int, samples: int) -> None:
        """Report an event if more samples were lost by the end of a step than before."""
        if samples > self.samples_lost:
            more = samples - self.samples_lost
            self.event(
                f"step {step}: {more:,} samples of damaged shards skipped, {samples:,} in all; the ranks' logs name "
                "the shards"
            )
            self.samples_lost = samples

    def failed(self, error: BaseException) -> None:
        """Write that the run ends with an error of its own."""
        self.status.state, self.status.message = "failed", redact(str(error))
        self._write()

    def interrupted(self, why: str) -> None:
        """Write that the watchdog ends the run; called by its thread, on whichever rank can still tell."""
        self.status.state, self.status.message = "interrupted", why
        self.event(why)
        if not self._attempt.superseded_by():
            self._beat()

    def _write(self) -> None:
        if self._rank == 0 and end_of(self._attempt) is None and not self._attempt.superseded_by():
            self._beat()

    def _beat(self) -> None:
        self.status.heartbeat = time.time()
        self._attempt.run.write_status(self.status)
