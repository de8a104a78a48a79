"""What report.json holds: the versioned schema of the context report. Numbers in nats, lengths in tokens.

A reader may rely on `format`: a field is never renamed, removed or given another meaning without a new number.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pretrain.errors import UserError

REPORT_FORMAT: Literal[2] = 2

Interval = tuple[float, float]
"""95 %, by bootstrap over documents."""


class ReportEntry(BaseModel):
    """A part of the report; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LengthResult(ReportEntry):
    """The same targets, predicted from windows of one length."""

    multiple: float
    """Multiple of the training length."""
    length: int
    """Positions of the window."""
    loss: float
    """Nats per masked token."""
    loss_interval: Interval
    perplexity: float
    masked_accuracy: float
    accuracy_interval: Interval
    gain: float
    """Loss from the window cropped to the training length minus loss from this one: above zero, the context helps."""
    gain_interval: Interval
    step_gain: float | None
    """Loss at the length before minus loss at this one; None at the shortest."""
    step_gain_interval: Interval | None
    helped: float
    """Share of the targets whose loss is lower than at the training length by more than the threshold."""
    hurt: float
    """Share of the targets whose loss is higher by more than the threshold."""
    needing_loss: float | None
    """Loss of the targets that need context (see `ContextNeed`)."""
    needing_gain: float | None
    """Their gain over the training length."""
    needing_gain_interval: Interval | None


class ContextNeed(ReportEntry):
    """Targets that need context: their loss falls by more than `threshold` from `short_length` to the training length.

    Both lengths were trained on, so the choice does not look at what is to be judged.
    """

    threshold: float
    short_length: int
    targets: int


class Bin(ReportEntry):
    """Targets whose quantity lies in [low, high)."""

    low: float
    high: float
    targets: int
    loss: float
    loss_interval: Interval
    gain: float
    """Gain over the window cropped to the training length, on the same targets."""


class LossProfile(ReportEntry):
    """Loss at one length by a quantity of the target."""

    multiple: float
    by: Literal["position", "edge_distance", "document_length"]
    """`position`: share of the window before the target. `edge_distance`: tokens to the nearer edge of the window.
    `document_length`: tokens of its document."""
    bins: list[Bin]


class InterventionResult(ReportEntry):
    """An intervention at one length, on a part of the windows; plain values are on the same part."""

    reading: str
    multiple: float
    factor: float
    loss: float
    loss_interval: Interval
    gain: float
    """Loss of the plain encoder at the training length minus this loss."""
    gain_interval: Interval
    regression: float
    """Loss at the training length under this intervention, with this factor, minus the plain one."""
    regression_interval: Interval


class TaskCell(ReportEntry):
    """A place of a synthetic task."""

    distance: int
    """Tokens from the beginning of what is to be found to the beginning of the question."""
    depth: float
    """Place of the pair in the room that it has: 0 first, 1 last."""
    side: Literal["past", "future"]
    """Side on which the answer stands, seen from the question."""
    accuracy: float
    answers: int


class TaskResult(ReportEntry):
    """A synthetic task at one length."""

    task: Literal["passkey", "multikey", "copy"]
    reading: str
    """`plain`, or which triangle was off."""
    multiple: float
    length: int
    chance: float
    accuracy: float
    accuracy_interval: Interval
    """95 %, Wilson's for a share."""
    answers: int
    cells: list[TaskCell]


EDGE_TOKENS = 4
"""Tokens at either end of the window, on which attention is told apart."""


class AttentionResult(ReportEntry):
    """How one triangle of one layer attends at one length; means over heads and sampled queries."""

    multiple: float
    layer: int
    """Number of the layer, from 1."""
    triangle: Literal["past", "future", "both"]
    window: int | None
    entropy: float
    """Nats."""
    uniform_entropy: float
    """Entropy of attending evenly to all that it may see."""
    largest_logit: float
    first_tokens: float
    """Attention on the window's first EDGE_TOKENS tokens, by queries that do not stand beside them."""
    last_tokens: float
    by_distance: list[float]
    """Attention to keys 0, 1, 2 to 3, 4 to 7, ... positions away; adds up to 1."""


class PseudoResult(ReportEntry):
    """One mask at a time against all masks at once, on the same targets at one length."""

    multiple: float
    targets: int
    masked_loss: float
    """The cheap loss: a share of the tokens is masked at once."""
    single_loss: float
    """Loss with every other token visible; its exponential is the pseudo-perplexity."""
    single_interval: Interval
    correlation: float


class SpeedResult(ReportEntry):
    """Speed of scoring plain windows of one length, on one rank."""

    multiple: float
    length: int
    tokens_per_s: float
    peak_memory_bytes: int | None
    """Above what the process held before; None where it cannot be measured."""


class RecalibrationResult(ReportEntry):
    """A short training on long rows, from the checkpoint on."""

    tokens: int
    length: int
    seconds: float | None
    run_folder: str
    results: list[InterventionResult]
    """Results at every length; `regression` is that at the training length."""


class Provenance(ReportEntry):
    """What was run, so that it can be run again."""

    command: str
    diptych: str
    torch: str
    device: str
    ranks: int
    seed: int
    config: str
    """Path of the run's config.yaml."""
    corpus: str
    fingerprint: str
    tokenizer_sha256: str
    checkpoint_sha256: str
    """Digest of the checkpoint's MANIFEST.json, which covers every byte of it."""
    written: str
    """UTC."""


class ContextReport(ReportEntry):
    """report.json."""

    format: Literal[2] = REPORT_FORMAT
    headline: str
    run: str
    step: int
    tokens_seen: int
    training_length: int
    split: str
    corpus: str
    documents: int
    windows: int
    targets: int
    reading_windows: int
    unigram_entropy: float
    """Entropy of the training split's token frequencies, in nats."""
    unigram_loss: float
    """Loss per target, when it is predicted from these frequencies alone."""
    effective_multiple: float
    """See `effective_length`."""
    effective_length: int
    """The longest length up to which, at every length on the way, the loss is no worse than at the training length and
    the gain over it is above zero with its interval; the training length itself if there is none."""
    used_multiple: float
    """The longest length up to which every length lowers the loss of the one before, with its interval: beyond it, more
    context changes nothing or harms."""
    held_multiple: float
    """The longest length up to which the loss is at most 1 % above that at the training length, or within the interval
    of the difference."""
    results: list[LengthResult]
    skipped: dict[str, str]
    """What could not be measured -> why: a length ("16x"), or an intervention by its name."""
    context_need: ContextNeed | None
    profiles: list[LossProfile]
    readings: list[InterventionResult]
    ablations: list[InterventionResult]
    tasks: list[TaskResult]
    attention: list[AttentionResult]
    pseudo: list[PseudoResult]
    speed: list[SpeedResult]
    recalibrations: list[RecalibrationResult]
    budget: str | None
    """What the time limit made of the settings."""
    settings: dict[str, str | int | float]
    model: dict[str, str]
    """What the encoder is, in a few words each."""
    provenance: Provenance

    def result(self, multiple: float) -> LengthResult:
        """Return the result at one of the measured lengths."""
        return next(r for r in self.results if r.multiple == multiple)


def read_report(path: Path) -> ContextReport:
    """Read a report.json.

    Raises:
        UserError: there is none, or it is of another version.
    """
    if not path.is_file():
        raise UserError(f"there is no report at {path}; write it with `diptych evaluate context {path.parents[2]}`")
    try:
        return ContextReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{path} is not a context report of this version (format {REPORT_FORMAT}: {error.errors()[0]['msg']}); "
            f"write it again with `diptych evaluate context {path.parents[2]}`"
        ) from error
