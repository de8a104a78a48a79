"""Where a stream stands: what a checkpoint keeps of it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pretrain.data.arrays import Ints

ORDER = 2
"""Number of the order of rows and masks that this code makes; to be raised with whatever changes it."""
PER_STREAM = ("visits", "rows", "lost")
"""The fields of `StreamState` that hold a number per stream."""


@dataclass(frozen=True)
class StreamState:
    """Place of the whole stream, after `position` global rows: no rank, no world size, no worker in it."""

    position: int
    """Rows taken, over all streams."""
    positions: int
    """Their positions, padding included."""
    visits: Ints
    """int64 [S]: the visit at hand of each stream, 0 for its first."""
    rows: Ints
    """int64 [S, P]: rows already taken in that visit in each phase of the run so far; the last is the one at hand."""
    lost: Ints
    """int64 [S]: samples passed over so far because their shard was damaged."""
    order: int = ORDER
    """The order that the rows were taken in."""

    @classmethod
    def start(cls, streams: int) -> "StreamState":
        """Return the state before the first row."""
        visits, lost = np.zeros((2, streams), dtype=np.int64)
        return cls(0, 0, visits, np.zeros((streams, 1), dtype=np.int64), lost)

    def in_phase(self, phase: int) -> "StreamState":
        """Return the same place, to be read on from in a phase, whose rows are counted anew."""
        streams, phases = self.rows.shape
        assert phases <= phase + 1, "a run does not go back to an earlier phase"
        new = np.zeros((streams, phase + 1 - phases), dtype=np.int64)
        return replace(self, rows=np.hstack((self.rows, new)))

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        numbers = {"order": self.order, "position": self.position, "positions": self.positions}
        return {**numbers, **{name: getattr(self, name).tolist() for name in PER_STREAM}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StreamState":
        """Return the state that `to_json` made the values of."""
        visits, rows, lost = (np.array(value[name], np.int64) for name in PER_STREAM)
        return cls(value["position"], value["positions"], visits, rows, lost, value.get("order", 1))

    def is_behind(self, earlier: "StreamState") -> bool:
        """Say whether this cannot follow `earlier`: a stream went back, or lost samples and still is in that visit."""
        visits, rows = self.visits - earlier.visits, self.rows[:, -1] - earlier.rows[:, -1]
        lost = self.lost - earlier.lost
        return bool(((visits < 0) | (lost < 0) | (visits == 0) & ((rows < 0) | (lost > 0))).any())

    def of_streams(self, streams: Iterable[int]) -> dict[int, list[Any]]:
        """Return the numbers of some streams, by stream."""
        return {s: [getattr(self, name)[s].tolist() for name in PER_STREAM] for s in streams}

    def merged(self, of_ranks: Iterable[dict[int, list[Any]]]) -> "StreamState":
        """Return the state with every stream's numbers from the rank that reads it, by its `of_streams`."""
        fields = {name: getattr(self, name).copy() for name in PER_STREAM}
        for of_rank in of_ranks:
            for stream, numbers in of_rank.items():
                for name, number in zip(PER_STREAM, numbers, strict=True):
                    fields[name][stream] = number
        return replace(self, **fields)
