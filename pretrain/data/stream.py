"""The order of rows: (seed, position) -> row, the same on any number of ranks and with any number of workers.

Global row g belongs to stream g mod S. A stream visits shards one after another, without end: the shards of epoch e
are a permutation that depends on (seed, e); these permutations, one after another, are dealt to the S streams like
cards. So every shard is visited equally often, however many there are, and no rank can run out of rows. In a visit
all chunks of all documents of the shard are taken once, in an order that depends on (seed, visit).

Where a stream stands is two integers, its visit and its row in that visit; resuming opens the shards at hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.counter_random import permutation
from pretrain.data.manifest import Manifest, Split
from pretrain.data.packing import PackingRule, RowPlan, plan_rows, whole_documents
from pretrain.data.shards import Shard
from pretrain.data.tokenizer import BOS, EOS, PAD
from pretrain.errors import UserError

_SHARDS, _ROWS = 1, 2
"""First part of a key, so that the two kinds of permutation are independent."""


@dataclass(frozen=True)
class StreamState:
    """Where the whole stream stands, after `position` global rows: no rank, no world size, no worker in it."""

    position: int
    """Rows taken, over all streams."""
    visits: npt.NDArray[np.int64]
    """int64 [S]: the visit at hand of each stream, 0 for its first."""
    rows: npt.NDArray[np.int64]
    """int64 [S]: rows already taken in that visit."""

    @classmethod
    def start(cls, streams: int) -> "StreamState":
        """Nothing taken yet."""
        return cls(0, np.zeros(streams, dtype=np.int64), np.zeros(streams, dtype=np.int64))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"position": self.position, "visits": self.visits.tolist(), "rows": self.rows.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StreamState":
        """The inverse of `to_json`."""
        return cls(value["position"], np.array(value["visits"], np.int64), np.array(value["rows"], np.int64))


@dataclass(frozen=True)
class Row:
    """A row before masking: documents, or pieces of them, then padding."""

    ids: npt.NDArray[np.int64]
    """int64 [L]."""
    begins: list[int]
    """The column in which each document begins."""
    length: int
    """Positions that are not padding."""


class RowSource:
    """The shards of one split, as visits: which shard comes when, cut and packed into which rows."""

    def __init__(self, corpus: Path, manifest: Manifest, split: Split, seed: int, packing: PackingRule) -> None:
        self._corpus, self._dtype = corpus, manifest.token_dtype
        self._entries = manifest.splits[split].shards
        self._seed, self._packing = seed, packing
        if not self._entries:
            raise UserError(f"the corpus at {corpus} has no {split} split; build it with corpus.splits.{split} > 0")
        self._permutation = lru_cache(maxsize=4)(lambda epoch: permutation(len(self._entries), seed, _SHARDS, epoch))

    @property
    def num_shards(self) -> int:
        """Shards of the split."""
        return len(self._entries)

    def open(self, dealt: int) -> tuple[Shard, RowPlan]:
        """The shard of visit number `dealt` (over all streams), verified, and its rows in order."""
        epoch, card = divmod(dealt, len(self._entries))
        shard = Shard(self._corpus, self._entries[self._permutation(epoch)[card]], self._dtype)
        return shard, plan_rows(whole_documents(shard.lengths), self._packing, self._seed, _ROWS, dealt)

    def read(self, shard: Shard, plan: RowPlan, row: int) -> Row:
        """One row's ids, with begin and end symbols, padded."""
        ids = np.full(self._packing.sequence_length, PAD, dtype=np.int64)
        begins, column = [], 0
        pieces = slice(plan.bounds[row], plan.bounds[row + 1])
        of_pieces = (field[pieces].tolist() for field in (plan.samples, plan.starts, plan.lengths))
        for sample, start, length in zip(*of_pieces, strict=True):
            begins.append(column)
            end = column + length
            num_ids = shard.num_tokens(sample)
            first, last = max(start - 1, 0), min(start + length - 1, num_ids)
            if start == 0:
                ids[column] = BOS
            begin = column + first + 1 - start
            ids[begin : begin + last - first] = shard.tokens(sample, first, last)
            if start + length == num_ids + 2:
                ids[end - 1] = EOS
            column = end
        return Row(ids, begins, column)


class StreamReader:
    """The rows of those streams that one rank reads: s = rank mod world size."""

    def __init__(self, source: RowSource, state: StreamState, rank: int = 0, world_size: int = 1) -> None:
        assert len(state.visits) % world_size == 0, "the config check lets only divisors of the streams through"
        self._source, self._rank, self._world_size = source, rank, world_size
        self._streams = len(state.visits)
        self._position = state.position
        self._visits, self._rows = state.visits.copy(), state.rows.copy()
        self._at_hand: dict[int, tuple[Shard, RowPlan]] = {}

    @property
    def state(self) -> StreamState:
        """After the last row that `rows` gave. Entries of other ranks' streams are theirs to report."""
        return StreamState(self._position, self._visits.copy(), self._rows.copy())

    @property
    def own_streams(self) -> npt.NDArray[np.int64]:
        """Numbers of the streams that this rank reads."""
        return np.arange(self._rank, self._streams, self._world_size)

    def rows(self, count: int, read: bool = True) -> Iterator[tuple[int, Row | None]]:
        """Move on by `count` global rows and give those of this rank as (global row number, row).

        With `read=False` the rows are only counted, which costs next to nothing: that is how several workers share
        a rank's streams and still keep one order.
        """
        first, self._position = self._position, self._position + count
        for number in range(first + (self._rank - first) % self._world_size, first + count, self._world_size):
            stream = number % self._streams
            shard, plan = self._open_with_rows_left(stream)
            row = int(self._rows[stream])
            self._rows[stream] += 1
            yield number, self._source.read(shard, plan, row) if read else None

    def _open_with_rows_left(self, stream: int) -> tuple[Shard, RowPlan]:
        if stream not in self._at_hand:
            self._at_hand[stream] = self._open(stream)
        while self._rows[stream] >= len(self._at_hand[stream][1]):
            self._visits[stream] += 1
            self._rows[stream] = 0
            self._at_hand[stream] = self._open(stream)
        return self._at_hand[stream]

    def _open(self, stream: int) -> tuple[Shard, RowPlan]:
        return self._source.open(int(self._visits[stream]) * self._streams + stream)
