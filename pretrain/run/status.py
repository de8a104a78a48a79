"""status.json of a run folder: how the run is doing, written by rank 0 and read by whoever watches it."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

KEPT_EVENTS = 100
LIVE_STATES = frozenset({"starting", "training", "validating", "saving"})


class Status(BaseModel):
    """Replaced every few steps. A key that this version does not know is ignored."""

    model_config = ConfigDict(extra="ignore")

    state: str = "starting"
    """One of LIVE_STATES, or done, interrupted or failed."""
    step: int = 0
    tokens: int = 0
    total_tokens: int = 0
    loss: float | None = None
    masked_accuracy: float | None = None
    """Share of the masked tokens, 0 to 1."""
    learning_rate: float | None = None
    tokens_per_s: float | None = None
    flops_per_s: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1; None where the device's peak is not known."""
    time_shares: dict[str, float] | None = None
    """Shares of the time of the last steps, validation and saving included; together 1."""
    peak_memory_bytes: int | None = None
    """Peak of the rank that has needed most."""
    planned_memory_bytes: int | None = None
    seconds_left: float | None = None
    validation_loss: float | None = None
    validation_step: int | None = None
    checkpoint: str | None = None
    attempt: int | None = None
    """Number of the start that wrote this."""
    ranks: int | None = None
    precision: str | None = None
    heartbeat: float
    """Unix time in seconds."""
    skipped_steps: int = 0
    """Steps at which the optimizer did not move, since the run began."""
    message: str | None = None
    """What is wrong, while something is."""
    events: list[str] = []
    """What happened during this attempt, oldest first; only the latest are kept."""
    events_before: int = 0
    """Events of this attempt that are no longer among them."""

    def add_event(self, text: str) -> None:
        """Add what has happened."""
        self.events.append(text)
        if len(self.events) > 2 * KEPT_EVENTS:
            self.events_before += len(self.events) - KEPT_EVENTS
            del self.events[:-KEPT_EVENTS]


def parse_status(file: Path) -> Status | None:
    """The status in a file; None where there is none, or none that can be read."""
    try:
        return Status.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
