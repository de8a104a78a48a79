"""The order of rows: (seed, position) -> row, the same on any number of ranks and with any number of workers.

Global row g belongs to stream g mod S. A stream visits shards one after another, without end: the shards of epoch e
are a permutation that depends on (seed, e); these permutations, one after another, are dealt to the S streams like
cards. So every shard is visited equally often, however many there are, and no rank can run out of rows. In a visit
all chunks of all documents of the shard are taken once, in an order that depends on (seed, visit).

Where a stream stands is two integers, its visit and its row in that visit; resuming opens the shards at hand. Where a
phase with other rows begins inside a visit, what is left of the visit is planned anew, so a visit has a row count for
each phase of the run so far.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.counter_random import permutation
from pretrain.data.manifest import Manifest, ShardEntry, Split
from pretrain.data.packing import PackingRule, RowPlan, plan_rows, remaining_spans, repeats_of, whole_documents
from pretrain.data.shard_access import ShardAccess
from pretrain.data.shards import DamagedShardError, Shard
from pretrain.data.tokenizer import BOS, EOS, PAD
from pretrain.errors import UserError
from pretrain.files import sha256_of

log = logging.getLogger(__name__)

_SHARDS, _ROWS, _WEIGHTS = 1, 2, 10
"""First part of a key, so that choices of these kinds are independent (others have the numbers between)."""


PER_STREAM = ("visits", "rows", "lost")
"""The fields of `StreamState` that hold a number per stream."""


@dataclass(frozen=True)
class StreamState:
    """Where the whole stream stands, after `position` global rows: no rank, no world size, no worker in it."""

    position: int
    """Rows taken, over all streams."""
    positions: int
    """Their positions, padding included."""
    visits: npt.NDArray[np.int64]
    """int64 [S]: the visit at hand of each stream, 0 for its first."""
    rows: npt.NDArray[np.int64]
    """int64 [S, P]: rows already taken in that visit in each phase of the run so far; the last is the one at hand."""
    lost: npt.NDArray[np.int64]
    """int64 [S]: samples passed over so far because their shard was damaged."""

    @classmethod
    def start(cls, streams: int) -> "StreamState":
        """Nothing taken yet."""
        visits, lost = np.zeros((2, streams), dtype=np.int64)
        return cls(0, 0, visits, np.zeros((streams, 1), dtype=np.int64), lost)

    def in_phase(self, phase: int) -> "StreamState":
        """The same place, to be read on from in a phase, whose rows are counted anew."""
        streams, phases = self.rows.shape
        assert phases <= phase + 1, "a run does not go back to an earlier phase"
        new = np.zeros((streams, phase + 1 - phases), dtype=np.int64)
        return StreamState(self.position, self.positions, self.visits, np.hstack((self.rows, new)), self.lost)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        numbers = {"position": self.position, "positions": self.positions}
        return {**numbers, **{name: getattr(self, name).tolist() for name in PER_STREAM}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StreamState":
        """The inverse of `to_json`."""
        return cls(value["position"], value["positions"], *(np.array(value[name], np.int64) for name in PER_STREAM))

    def of_streams(self, streams: Iterable[int]) -> dict[int, list[Any]]:
        """The numbers of some streams, by stream."""
        return {s: [getattr(self, name)[s].tolist() for name in PER_STREAM] for s in streams}

    def merged(self, parts: Iterable[dict[int, list[Any]]]) -> "StreamState":
        """This state, with every stream's numbers as the rank that reads it reported them by `of_streams`."""
        fields = {name: getattr(self, name).copy() for name in PER_STREAM}
        for part in parts:
            for stream, numbers in part.items():
                for name, number in zip(PER_STREAM, numbers, strict=True):
                    fields[name][stream] = number
        return StreamState(self.position, self.positions, **fields)


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
    """The shards of one split, as visits: which shard comes when, cut and packed into which rows.

    `rules` are those of the run's phases, up to the one at hand.
    """

    def __init__(
        self,
        corpus: Path,
        manifest: Manifest,
        split: Split,
        seed: int,
        rules: Sequence[PackingRule],
        shards: ShardAccess | None = None,
    ) -> None:
        self._corpus, self._dtype = corpus, manifest.token_dtype
        self._entries = manifest.splits[split].shards
        self._seed, self._rules, self._shards = seed, rules, shards or ShardAccess()
        if not self._entries:
            raise UserError(f"the corpus at {corpus} has no {split} split; build it with corpus.splits.{split} > 0")
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    @property
    def num_shards(self) -> int:
        """Shards of the split."""
        return len(self._entries)

    @property
    def sequence_length(self) -> int:
        """Positions per row, in the phase at hand."""
        return self._rules[-1].sequence_length

    def entry(self, dealt: int) -> ShardEntry:
        """The shard of visit number `dealt` (over all streams)."""
        return self._entries[self._number(dealt)]

    def _number(self, dealt: int) -> int:
        epoch, card = divmod(dealt, len(self._entries))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(len(self._entries), self._seed, _SHARDS, epoch)
        return int(self._order[1][card])

    def open(self, dealt: int, rows: Sequence[int] = ()) -> tuple[Shard, RowPlan]:
        """The shard of visit number `dealt`, verified, and its rows in order, in the phase at hand.

        `rows` were taken in this visit in each phase so far; by default the visit has just begun.

        Raises:
            DamagedShardError: under `on_corrupt: error`, the shard is not what the manifest says.
        """
        shard = self._shards.open(self._corpus, self.entry(dealt), self._dtype)
        return shard, self._plan(shard.lengths, shard.sources, dealt, rows or [0] * len(self._rules))

    def try_open(self, dealt: int, rows: Sequence[int] = ()) -> tuple[Shard, RowPlan] | None:
        """The same; None, with a warning in the log, for a damaged shard under `on_corrupt: skip`."""
        try:
            return self.open(dealt, rows)
        except DamagedShardError as error:
            if self._shards.on_corrupt == "error":
                raise
            log.warning("%d samples skipped: %s", self.entry(dealt).samples, error)
            return None

    def fetch_ahead(self, dealt: int) -> None:
        """A visit will come soon."""
        self._shards.fetch_ahead(self._corpus, self.entry(dealt))

    def samples_after(self, dealt: int, rows: Sequence[int]) -> int:
        """Samples of a damaged shard that are not, or not wholly, in the rows that were taken of a visit.

        Where the index is lost too, all of them.
        """
        entry = self.entry(dealt)
        path = self._corpus / entry.index_path
        if not any(rows) or not path.is_file() or sha256_of(path) != entry.index_sha256:
            return entry.samples
        index = np.load(path, allow_pickle=False)
        sources = index[:, 2] if index.shape[1] > 2 else np.zeros(len(index), dtype=np.int64)
        plan = self._plan(index[:, 1], sources, dealt, rows)
        return len(np.unique(plan.samples[plan.bounds[rows[-1]] :]))

    def _plan(
        self,
        lengths: npt.NDArray[np.int64],
        sources: npt.NDArray[np.int64],
        dealt: int,
        rows: Sequence[int],
    ) -> RowPlan:
        """The rows of a visit: what earlier phases left of it, by the rule of the phase at hand."""
        begun = next((phase for phase, taken in enumerate(rows) if taken), len(rows) - 1)
        repeats, weights = None, self._rules[begun].source_weights
        if weights:
            key = (self._seed, _WEIGHTS, self._number(dealt))
            repeats = repeats_of(np.array(weights)[sources], dealt // len(self._entries), *key)
        spans = whole_documents(lengths, repeats)
        for phase in range(begun, len(rows) - 1):
            if rows[phase]:
                earlier = plan_rows(spans, self._rules[phase], self._seed, _ROWS, dealt, phase)
                spans = remaining_spans(earlier, rows[phase])
        return plan_rows(spans, self._rules[-1], self._seed, _ROWS, dealt, len(rows) - 1)

    def read(self, shard: Shard, plan: RowPlan, row: int) -> Row:
        """One row's ids, with begin and end symbols, padded."""
        ids = np.full(self.sequence_length, PAD, dtype=np.int64)
        begins, column = [], 0
        pieces = slice(plan.bounds[row], plan.bounds[row + 1])
        of_pieces = (numbers[pieces].tolist() for numbers in (plan.samples, plan.starts, plan.lengths))
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
        self._position, self._positions = state.position, state.positions
        self._visits, self._rows, self._lost = state.visits.copy(), state.rows.copy(), state.lost.copy()
        self._at_hand: dict[int, tuple[Shard, RowPlan]] = {}

    @property
    def state(self) -> StreamState:
        """After the last row that `rows` gave. Entries of other ranks' streams are theirs to report."""
        return StreamState(self._position, self._positions, self._visits.copy(), self._rows.copy(), self._lost.copy())

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
        self._positions += count * self._source.sequence_length
        for number in range(first + (self._rank - first) % self._world_size, first + count, self._world_size):
            stream = number % self._streams
            shard, plan = self._open_with_rows_left(stream)
            row = int(self._rows[stream, -1])
            self._rows[stream, -1] += 1
            yield number, self._source.read(shard, plan, row) if read else None

    def _open_with_rows_left(self, stream: int) -> tuple[Shard, RowPlan]:
        """The shard at hand. A damaged one has no rows, on every rank and worker that opens it, now or after a resume:
        so its stream goes on with the next, and no rank waits for another.
        """
        opened = self._at_hand.get(stream) or self._open(stream)
        visits_left = 2 * self._source.num_shards
        while opened is None or self._rows[stream, -1] >= len(opened[1]):
            if opened is None:
                self._lost[stream] += self._source.samples_after(self._dealt(stream), self._rows[stream].tolist())
            visits_left -= 1
            if not visits_left:
                raise UserError("none of the shards that are left has a row to give; run `diptych data verify`")
            self._visits[stream] += 1
            self._rows[stream] = 0
            opened = self._open(stream)
        if stream not in self._at_hand or opened is not self._at_hand[stream]:
            self._source.fetch_ahead(self._dealt(stream) + self._streams)
        self._at_hand[stream] = opened
        return opened

    def _dealt(self, stream: int) -> int:
        return int(self._visits[stream]) * self._streams + stream

    def _open(self, stream: int) -> tuple[Shard, RowPlan] | None:
        return self._source.try_open(self._dealt(stream), self._rows[stream].tolist())
