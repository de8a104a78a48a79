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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pretrain.config.parallel import SOLE_READER, DataRank
from pretrain.data.arrays import Flags, Ints
from pretrain.data.counter_random import Namespace, permutation
from pretrain.data.manifest import Manifest, ShardEntry, Split
from pretrain.data.shards.access import ShardAccess
from pretrain.data.shards.shard import DamagedShardError, Shard, read_index
from pretrain.data.stream.packing import PackingRule, RowPlan, plan_rows, remaining_spans, repeats_of, whole_documents
from pretrain.data.stream.rows import UnmaskedRows, Visit, read_rows
from pretrain.data.stream.state import StreamState
from pretrain.errors import UserError
from pretrain.files import sha256_of

log = logging.getLogger(__name__)


class RowSource:
    """Shards of one split, as visits: which shard comes when, cut and packed into which rows.

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
        self._orders: dict[int, Ints] = {}
        """Order of the shards in the epochs in which the streams are, by number of the epoch."""
        self.left_out: frozenset[int] = frozenset()
        """Visits by number whose shard is damaged somewhere else, and so has no rows here either."""

    @property
    def num_shards(self) -> int:
        """Shards of the split."""
        return len(self._entries)

    @property
    def sequence_length(self) -> int:
        """Positions per row, in the phase at hand."""
        return self._rules[-1].sequence_length

    def entry(self, dealt: int) -> ShardEntry:
        """Return the shard of visit number `dealt` (over all streams)."""
        return self._entries[self._number(dealt)]

    def _number(self, dealt: int) -> int:
        epoch, card = divmod(dealt, len(self._entries))
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e > epoch - 3}
            self._orders[epoch] = permutation(len(self._entries), self._seed, Namespace.SHARD_ORDER, epoch)
        return int(self._orders[epoch][card])

    def open(self, dealt: int, rows: Sequence[int] = ()) -> tuple[Shard, RowPlan]:
        """Return the shard of visit number `dealt`, verified, and its rows in order, in the phase at hand.

        `rows` were taken in this visit in each phase so far; by default the visit has just begun.

        Raises:
            DamagedShardError: under `on_corrupt: error`, the shard is not what the manifest says.
        """
        shard = self._shards.open(self._corpus, self.entry(dealt), self._dtype)
        return shard, self._plan(shard.lengths, shard.sources, dealt, rows or [0] * len(self._rules))

    def try_open(self, dealt: int, rows: Sequence[int] = ()) -> tuple[Shard, RowPlan] | None:
        """Do as `open`; return None, with a warning in the log, for a damaged shard under `on_corrupt: skip`."""
        if dealt in self.left_out:
            return None
        try:
            return self.open(dealt, rows)
        except DamagedShardError as error:
            if self._shards.on_corrupt == "error":
                raise
            log.warning("%d samples skipped: %s", self.entry(dealt).samples, error)
            return None

    def fetch_ahead(self, dealt: int) -> None:
        """Begin to fetch the shard of a visit that will come soon."""
        self._shards.fetch_ahead(self._corpus, self.entry(dealt))

    def samples_after(self, dealt: int, rows: Sequence[int]) -> int:
        """Return how many samples of a damaged shard are not, or not wholly, in the rows that were taken of a visit.

        Where the index is lost too, all of them.
        """
        entry = self.entry(dealt)
        path = self._corpus / entry.index_path
        if not any(rows) or not path.is_file() or sha256_of(path) != entry.index_sha256:
            return entry.samples
        index = read_index(path)
        plan = self._plan(index[:, 1], index[:, 2], dealt, rows)
        return len(np.unique(plan.samples[plan.bounds[rows[-1]] :]))

    def _plan(
        self,
        lengths: Ints,
        sources: Ints,
        dealt: int,
        rows: Sequence[int],
    ) -> RowPlan:
        """Return the rows of a visit: what earlier phases left of it, by the rule of the phase at hand."""
        begun = next((phase for phase, taken in enumerate(rows) if taken), len(rows) - 1)
        repeats, weights = None, self._rules[begun].source_weights
        if weights:
            shard = (self._seed, Namespace.SOURCE_REPEATS, self._number(dealt))
            repeats = repeats_of(np.array(weights)[sources], dealt // len(self._entries), *shard)
        spans, key = whole_documents(lengths, repeats), (self._seed, Namespace.ROW_PLAN, dealt)
        for phase in range(begun, len(rows) - 1):
            if rows[phase]:
                earlier = plan_rows(spans, self._rules[phase], *key, phase)
                spans = remaining_spans(earlier, rows[phase])
        return plan_rows(spans, self._rules[-1], *key, len(rows) - 1)


@dataclass(frozen=True)
class Taken:
    """Rows that a reader went past, by where they stand; every field is int64 [rows]."""

    numbers: Ints
    """Global row numbers."""
    visits: Ints
    """Numbers of the visits, over all streams."""
    rows: Ints
    """Numbers of the rows in their visits."""

    def __getitem__(self, chosen: Flags) -> "Taken":
        """Return some of them."""
        return Taken(self.numbers[chosen], self.visits[chosen], self.rows[chosen])


class StreamReader:
    """Rows of the streams that one rank reads.

    `take` moves on and reads no token; `read` gives what was taken. So the workers that share a rank's streams all go
    the same way, each reads its own, and many rows are read at once.
    """

    def __init__(self, source: RowSource, state: StreamState, data_rank: DataRank = SOLE_READER) -> None:
        assert len(state.visits) % data_rank.count == 0, "the config check lets only divisors of the streams through"
        self.state = state
        """Place after the last row that was taken. Entries of other ranks' streams are theirs to report."""
        self._source, self._data_rank = source, data_rank
        self._streams = len(state.visits)
        self._sizes = np.zeros(self._streams, dtype=np.int64)
        """Rows of the visit at hand; 0 where it is not open yet."""
        self._open: dict[int, Visit] = {}
        """Visits at hand, and those of which rows were taken since the last `read`, by number."""

    def take(self, count: int) -> Taken:
        """Move on by `count` global rows; return those of this rank."""
        return self.take_steps(count, 1)[0]

    def take_steps(self, count: int, steps: int) -> tuple[Taken, list[StreamState]]:
        """Move on by `steps` times `count` global rows; return those of this rank, and the state after each step."""
        rank, first, own = self._data_rank, self.state.position, np.array(self._data_rank.streams(self._streams))
        ends = first + count * np.arange(1, steps + 1)
        # Row n of stream s is global row s + n S, so the stream has (g - s - 1) // S + 1 rows below g.
        before = (first - own - 1) // self._streams + 1
        depths = (ends[:, None] - own - 1) // self._streams + 1 - before
        table = self._deal(own, depths[-1])
        numbers = np.arange(first + (rank.index - first) % rank.count, ends[-1], rank.count)
        at = numbers % self._streams // rank.count
        visits, rows, _ = table[:, at, numbers // self._streams - before[at] + 1]
        states = self._states(own, table[:, np.arange(len(own)), depths], count)
        self.state = states[-1]
        return Taken(numbers, visits * self._streams + own[at], rows - 1), states

    def _states(self, own: Ints, after: Ints, count: int) -> list[StreamState]:
        """Return the state after each step of `count` rows; `after`, int64 [3, steps, own], are the own streams'."""
        old, steps = self.state, after.shape[1]
        visits, rows, lost = (np.repeat(numbers[None], steps, axis=0) for numbers in (old.visits, old.rows, old.lost))
        visits[:, own], rows[:, own, -1], lost[:, own] = after
        rows[visits != old.visits, :-1] = 0  # Rows of earlier phases are of the visit that was begun in them.
        length = self._source.sequence_length
        return [
            StreamState(old.position + n * count, old.positions + n * count * length, *of_step)
            for n, of_step in enumerate(zip(visits, rows, lost, strict=True), start=1)
        ]

    def _deal(self, own: Ints, wanted: Ints) -> Ints:
        """Return where streams stand after 0 to `wanted` of their next rows, int64 [3, own, n]: visit, row, lost."""
        state = self.state
        table = np.empty((3, len(own), wanted.max() + 1), dtype=np.int64)
        table[0], table[2] = state.visits[own, None], state.lost[own, None]
        table[1] = state.rows[own, -1, None] + np.arange(table.shape[2])
        ends_first = (table[1, :, 0] + wanted > self._sizes[own]) & (wanted > 0)
        for place in np.flatnonzero(ends_first).tolist():
            self._deal_across_visits(int(own[place]), table[:, place, : wanted[place] + 1])
        return table

    def _deal_across_visits(self, stream: int, table: Ints) -> None:
        """Fill in the same of one stream, int64 [3, n], whose visit at hand is not open or ends before the last row.

        A damaged shard has no rows, on every rank and worker that opens it, now or after a resume: so its stream goes
        on with the next, and no rank waits for another.
        """
        number, lost = int(table[0, 0]), int(table[2, 0])
        rows, done, wanted, without = self.state.rows[stream].tolist(), 0, table.shape[1] - 1, 0
        while done < wanted:
            visit = self._visit(number * self._streams + stream, rows)
            if visit is not None and rows[-1] < visit.num_rows:
                self._sizes[stream] = visit.num_rows
                last = min(wanted, done + visit.num_rows - rows[-1])
                table[:, done + 1 : last + 1] = [[number], [0], [lost]]
                table[1, done + 1 : last + 1] = np.arange(rows[-1], rows[-1] + last - done) + 1
                rows[-1], done, without = rows[-1] + last - done, last, 0
                continue
            lost += self._source.samples_after(number * self._streams + stream, rows) if visit is None else 0
            number, rows, without = number + 1, [0] * len(rows), without + 1
            if without == 2 * self._source.num_shards:
                raise UserError("none of the shards that are left has a row to give; run `diptych data verify`")

    def _visit(self, number: int, rows: Sequence[int]) -> Visit | None:
        """Return visit `number` over all streams, of which `rows` were taken; None if its shard is damaged."""
        if number not in self._open:
            opened = self._source.try_open(number, rows)
            if opened is None:
                return None
            self._source.fetch_ahead(number + self._streams)
            self._open[number] = Visit(*opened)
        return self._open[number]

    def read(self, taken: Taken, rows: UnmaskedRows) -> None:
        """Fill `rows` with rows that were taken since the last `read`, in their order."""
        order = np.argsort(taken.visits, kind="stable")  # Rows of one visit were taken in their order.
        visits, numbers = taken.visits[order], taken.rows[order]
        bounds = [0, *(np.flatnonzero(np.diff(visits)) + 1).tolist(), len(visits)]
        picks = [(self._open[int(visits[a])], numbers[a:b], order[a:b]) for a, b in pairwise(bounds)]
        read_rows(picks, rows)
        at_hand = set((self.state.visits * self._streams + np.arange(self._streams)).tolist())
        self._open = {number: visit for number, visit in self._open.items() if number in at_hand}
