"""What a step must pass before the optimizer moves, and what follows when steps fail: pure arithmetic, no processes.

A loss is a spike if it is further above the median of the last losses than `spike_threshold` times their spread
(1.4826 x the median absolute deviation, which for normal noise is the standard deviation): both hardly move when a few
losses are wild. The losses are those of metrics.jsonl, so a resumed run judges as an unbroken one does.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from pretrain.config.training import TrainingConfig

WINDOW = 128
"""Losses that are looked back upon."""


ENOUGH = 32
"""Before so many, no loss is a spike: a run learns fast at its beginning."""


SMALLEST_SPREAD = 0.01
"""As a share of the median: losses may happen to lie closer together than any spike needs to be apart."""


class Guard:
    """Judges steps, the same on every rank: all that goes into it is known to all."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._regime: Hashable = None
        self.skipped_in_a_row = 0
        self.reason: str | None = None
        """Why the last step was skipped, if it was."""

    def enter(self, regime: Hashable) -> None:
        """Losses of another phase, or with positions dropped, say nothing of what comes: forget them."""
        if regime != self._regime:
            self._regime = regime
            self._losses.clear()

    def replay(self, records: Iterable[dict[str, Any]], regime_of: Callable[[int], Hashable]) -> None:
        """Be as after the steps that `records` of metrics.jsonl tell of; `regime_of` takes the tokens seen before."""
        self._losses.clear()
        self._regime, self.skipped_in_a_row, self.reason = None, 0, None
        tokens: int | None = None
        for record in records:
            if "loss" not in record:
                continue
            self.enter(regime_of(record["tokens"] if tokens is None else tokens))
            tokens = record["tokens"]
            if "skipped" in record:
                self.skip(record["skipped"])
            else:
                self.taken()
                self.learn(record["loss"])

    def limit(self) -> float:
        """The loss above which a step is a spike; infinite while too few are known."""
        if len(self._losses) < ENOUGH:
            return math.inf
        median = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self._config.spike_threshold * max(spread, SMALLEST_SPREAD * abs(median))

    def objection(self, loss: float) -> str | None:
        """Why a step of this loss must not be taken; None if it may."""
        if not math.isfinite(loss):
            return "its loss is not finite"
        if loss > self.limit():
            return f"its loss of {loss:.4f} is a spike (above {self.limit():.4f})"
        return None

    def taken(self) -> None:
        """A step was taken."""
        self.skipped_in_a_row, self.reason = 0, None

    def learn(self, loss: float) -> None:
        """The loss of a step that was taken."""
        self._losses.append(loss)

    def skip(self, reason: str) -> None:
        """The step was skipped."""
        self.skipped_in_a_row += 1
        self.reason = reason

    @property
    def must_stop(self) -> bool:
        """Too many steps in a row were skipped."""
        return self.skipped_in_a_row >= self._config.max_skipped_steps
