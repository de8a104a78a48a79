"""What a step must pass before the optimizer moves, and what follows when steps fail: pure arithmetic, no processes.

A loss is a spike if it is further above the median of the last losses than `spike_threshold` times their spread
(1.4826 x the median absolute deviation, which for normal noise is the standard deviation): both hardly move when a few
losses are wild. The losses are those of metrics.jsonl, so a resumed run judges as an unbroken one does.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from pretrain.config.training import TrainingConfig

LOSSES_KEPT = 128
"""Number of losses that the next one is compared with."""
ENOUGH = 32
"""Number of losses below which no loss is a spike: a run learns fast at its beginning."""
SMALLEST_SPREAD = 0.01
"""Least spread, as a share of the median: losses may happen to lie closer together than any spike is away."""


class Guard:
    """Judge of steps, the same on every rank, since all that goes into it is known to all."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=LOSSES_KEPT)
        self._regime: Hashable = None
        self.skipped_in_a_row = 0
        self.reason: str | None = None
        """Why the last step was skipped; None if it was taken."""

    @property
    def looks_first(self) -> bool:
        """Whether a loss is judged before the optimizer moves, which waits for the device."""
        return self._config.spikes != "off"

    def enter(self, regime: Hashable) -> None:
        """Forget the losses if the next step is of another regime: those of another phase say nothing of it."""
        if regime != self._regime:
            self._regime = regime
            self._losses.clear()

    def limit(self) -> float:
        """Loss above which a step is a spike; infinite while too few are known."""
        if len(self._losses) < ENOUGH:
            return math.inf
        median = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self._config.spike_threshold * max(spread, SMALLEST_SPREAD * abs(median))

    def objection(self, loss: float) -> str | None:
        """Reason not to take a step of this loss; None if there is none."""
        if not math.isfinite(loss):
            return "its loss is not finite"
        if loss > self.limit():
            return f"its loss of {loss:.4f} is a spike (above {self.limit():.4f})"
        return None

    def count(self, skipped: str | None, loss: float | None) -> None:
        """Remember a step: the reason it was skipped, or else its loss, where that is known already."""
        self.reason = skipped
        self.skipped_in_a_row = 0 if skipped is None else self.skipped_in_a_row + 1
        if skipped is None and loss is not None:
            self._losses.append(loss)

    def review(self, records: Iterable[dict[str, Any]]) -> Iterator[str]:
        """Learn the losses of recorded steps that were taken unseen; yield a line for each that was a spike."""
        for record in records:
            if self.looks_first or "skipped" in record:
                continue
            if objection := self.objection(record["loss"]):
                yield f"step {record['step']} was taken although {objection}, since training.spikes is off"
            self._losses.append(record["loss"])

    def replay(self, records: Iterable[dict[str, Any]], regime_of: Callable[[int], Hashable]) -> None:
        """Become what it was after the steps in `records` of metrics.jsonl.

        `regime_of` takes the tokens seen before a step.
        """
        self._losses.clear()
        self._regime, self.skipped_in_a_row, self.reason = None, 0, None
        tokens: int | None = None
        for record in records:
            if "loss" in record:
                self.enter(regime_of(record["tokens"] if tokens is None else tokens))
                tokens = record["tokens"]
                self.count(record.get("skipped"), record["loss"])

    @property
    def trouble(self) -> str | None:
        """What is wrong, for the status of the run: how many of the last steps were skipped, and why."""
        count = self.skipped_in_a_row
        return f"the last {count} steps were skipped: {self.reason}" if count else None

    @property
    def must_stop(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.skipped_in_a_row >= self._config.max_skipped_steps
