"""Means over targets with intervals: bootstrap over documents, Wilson's interval for shares, and bins. Pure functions.

Targets of one document are not independent, so documents are resampled, not targets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pretrain.data.arrays import Flags, Floats

_BOOTSTRAP = 9
"""First part of the key of this file's random numbers."""

RESAMPLINGS = 1000


@dataclass(frozen=True)
class MeanEstimate:
    """A mean and its 95 % interval."""

    value: float
    interval: tuple[float, float]


class DocumentBootstrap:
    """Means over targets, with intervals from the same resamplings of the documents for every quantity."""

    def __init__(self, documents: Sequence[int] | npt.NDArray[np.int64], seed: int) -> None:
        """`documents` gives the document of every target."""
        names, self._owner = np.unique(np.asarray(documents), return_inverse=True)
        self.num_documents = len(names)
        generator = np.random.default_rng([seed, _BOOTSTRAP])
        self._draws = generator.integers(len(names), size=(RESAMPLINGS, len(names)))

    def mean(self, values: npt.ArrayLike, chosen: Flags | None = None) -> MeanEstimate:
        """Mean of the targets' values, or of the chosen ones; NaN if none is chosen."""
        weights = np.ones(len(self._owner)) if chosen is None else chosen.astype(np.float64)
        numbers = np.asarray(values, dtype=np.float64)
        sums = np.bincount(self._owner, numbers * weights, minlength=self.num_documents)
        counts = np.bincount(self._owner, weights, minlength=self.num_documents)
        if counts.sum() == 0:
            return MeanEstimate(math.nan, (math.nan, math.nan))
        drawn = counts[self._draws].sum(axis=1)
        means = sums[self._draws].sum(axis=1)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(means, [0.025, 0.975])
        return MeanEstimate(float(sums.sum() / counts.sum()), (float(low), float(high)))


def wilson(correct: int, answers: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, JASA 22, 1927)."""
    if answers == 0:
        return 0.0, 1.0
    z, p = 1.959964, correct / answers
    center = (p + z * z / (2 * answers)) / (1 + z * z / answers)
    half = z / (1 + z * z / answers) * math.sqrt(p * (1 - p) / answers + z * z / (4 * answers * answers))
    return max(0.0, center - half), min(1.0, center + half)


def doubling_bins(smallest: int, largest: int) -> list[tuple[float, float]]:
    """[0, smallest), [smallest, 2 smallest), ... up to and beyond `largest`."""
    bounds = [0, smallest]
    while bounds[-1] <= largest:
        bounds.append(2 * bounds[-1])
    return [(float(low), float(high)) for low, high in pairwise(bounds)]


def even_bins(count: int) -> list[tuple[float, float]]:
    """[0, 1) in `count` equal parts."""
    return [(k / count, (k + 1) / count) for k in range(count)]


def entropy_of_counts(counts: Floats) -> float:
    """Entropy of the frequencies, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
