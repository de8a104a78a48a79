"""What is known of one optimizer step: before it, after it, and for the metrics."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks, known before the first forward."""

    masked: int
    """Positions to predict; what the summed loss is divided by."""
    tokens: int
    """Positions that are not padding."""
    rows_checksum: int
    """Checksum of all rows and their masks; the same for any number of ranks."""
    samples_lost: int
    """Samples lost in damaged shards since the run began."""
    stop: bool
    """Whether some rank was asked to stop: then the step must not be taken."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to; all but `sums` is the same on every rank."""

    sums: Tensor
    """float32 [2] on the device: this rank's summed loss in nats, and its correctly predicted positions."""
    grad_norm: float
    """Global gradient norm before clipping; not finite where the step was skipped for it."""
    loss: float | None = None
    """Loss of the whole step in nats per masked position, where a guard saw it before the optimizer moved."""
    skipped: str | None = None
    """Why the optimizer did not move; None where it did."""


@dataclass(frozen=True)
class StepRecord:
    """A step as the metrics keep it until the next flush."""

    step: int
    tokens_seen: int
    totals: StepTotals
    learning_rate: float
    outcome: StepOutcome
    seconds: float
    """Seconds since the step before, without validation and saving between them."""
    squares: Tensor | None = None
    """Sums of squares of an inspected step, see `Inspection.squares`."""
