"""What others see of a run while it runs: status.json and the events in it, written by rank 0 alone."""

import logging
import time
from typing import Any

from pretrain.checkpoint.format import TrainingState
from pretrain.redaction import redact
from pretrain.run.attempt import Attempt
from pretrain.run.status import Status
from pretrain.training.guards import Guard
from pretrain.training.monitor.heartbeats import end_of

log = logging.getLogger(__name__)


class Report:
    """The status of a run; it says nothing more once another attempt has the run, or the watchdog has ended this."""

    def __init__(self, attempt: Attempt, rank: int, world_size: int, total_tokens: int) -> None:
        self._attempt, self._rank = attempt, rank
        self.samples_lost = 0
        """In damaged shards, as far as it was told."""
        self.status = Status(heartbeat=time.time(), total_tokens=total_tokens, attempt=attempt.number, ranks=world_size)

    def event(self, text: str) -> None:
        """Something happened: a line in this rank's log and in the status."""
        log.info(text)
        self.status.add_event(redact(text))

    def progress(self, doing: str, state: TrainingState, guard: Guard, record: dict[str, Any] | None = None) -> None:
        """Where the run stands; `record` is the newest of the metrics, if there is a new one."""
        status = self.status
        status.state, status.step, status.tokens = doing, state.step, state.tokens_seen
        status.skipped_steps = state.step - state.optimizer_steps
        count = guard.skipped_in_a_row
        status.message = f"the last {count} steps were skipped: {guard.reason}" if count else None
        if record is not None:
            status.loss, status.masked_accuracy = record["loss"], record["masked_accuracy"]
            status.learning_rate, status.tokens_per_s = record["learning_rate"], record["tokens_per_s"]
            status.flops_per_s, status.mfu = record["flops_per_s"], record.get("mfu")
            status.time_shares, status.peak_memory_bytes = record["time_shares"], record.get("peak_memory_bytes")
            status.planned_memory_bytes = record.get("planned_memory_bytes")
            status.seconds_left = max(status.total_tokens - status.tokens, 0) / record["tokens_per_s"]
        self._write()

    def samples_lost_by(self, step: int, samples: int) -> None:
        """So many samples were lost by the end of a step: an event, if they are more than before."""
        if samples > self.samples_lost:
            more = samples - self.samples_lost
            self.event(
                f"step {step}: {more:,} samples of damaged shards skipped, {samples:,} in all; the ranks' logs name "
                "the shards"
            )
            self.samples_lost = samples

    def failed(self, error: Exception) -> None:
        """The run ends with an error of its own."""
        self.status.state, self.status.message = "failed", redact(str(error))
        self._write()

    def interrupted(self, why: str) -> None:
        """The watchdog ends the run; called by its thread, on whichever rank can still tell."""
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
