"""Plans and shards -> rows of ids, many rows at once: what is done per row or per piece is done on whole arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.arrays import AnyInts, Ints
from pretrain.data.shards.shard import Shard
from pretrain.data.stream.packing import RowPlan
from pretrain.data.tokenizer import BOS, EOS, PAD

_BEGINS, _ENDS = 1, 2
"""Flags of a piece: it has its document's begin symbol, its end symbol."""
STRIP_POSITIONS = 2**14
"""Positions that are worked on at a time, so that they stay near the core."""


@dataclass(frozen=True)
class UnmaskedRows:
    """Documents, or pieces of them, in rows, then padding. Every field is int64 [rows, L]."""

    ids: Ints
    """Token ids, begin and end symbols among them."""
    document_ids: Ints
    """1, 2, ... for the documents of a row in order; 0 is padding."""
    position_ids: Ints
    """Position inside the document or piece, from 0; 0 in padding."""


class Visit:
    """Open shard, and the rows that one visit makes of it."""

    def __init__(self, shard: Shard, plan: RowPlan) -> None:
        ends = plan.starts + plan.lengths == shard.lengths[plan.samples] + 2
        flags = _BEGINS * (plan.starts == 0) + _ENDS * ends
        self._ids = shard.ids
        # The symbol before a document's first id has no place in the shard, hence the 1.
        pieces = np.stack((shard.firsts[plan.samples] + plan.starts - 1, plan.lengths, flags))
        dtype = np.int32 if len(shard.ids) < 2**31 else np.int64
        self._pieces: AnyInts = pieces.astype(dtype)
        self._bounds: AnyInts = plan.bounds.astype(dtype)
        self.num_rows = len(plan)

    def pieces_of(self, rows: Ints) -> tuple[AnyInts, AnyInts]:
        """Return the pieces of some rows, and how many pieces each row has.

        Returns:
            int [3, P]: place of the first id in `ids_at`, length, flags; and int [rows].
        """
        firsts = self._bounds[rows]
        counts = self._bounds[rows + 1] - firsts
        if rows[-1] - rows[0] == len(rows) - 1:
            return self._pieces[:, firsts[0] : firsts[0] + counts.sum()], counts
        before = np.cumsum(counts) - counts
        return self._pieces[:, np.repeat(firsts - before, counts) + np.arange(counts.sum())], counts

    def ids_at(self, places: Ints) -> AnyInts:
        """Return the ids at some places of the shard; any id for one outside."""
        return self._ids.take(places, mode="clip")


def read_rows(picks: Sequence[tuple[Visit, Ints, Ints]], rows: UnmaskedRows) -> None:
    """Fill `rows` with rows of several visits.

    What is as long as the rows is made a strip at a time: of large arrays, the memory alone costs more than the work.

    Args:
        picks: a visit, the numbers of its rows, rising, and their places in `rows`, none of which is left out.
        rows: where to write.
    """
    length = rows.ids.shape[1]
    segments, per_row = _segments(picks, length)
    places = np.concatenate([places for _, _, places in picks])
    _read_ids(picks, segments, per_row, rows.ids)

    segments = segments[:, np.argsort(np.repeat(places, per_row), kind="stable")]
    ends = np.empty_like(per_row)
    ends[places] = per_row
    ends = np.concatenate(([0], np.cumsum(ends)))
    strip = max(1, STRIP_POSITIONS // length)
    columns = np.arange(strip * length)
    for first in range(0, len(places), strip):
        at = slice(first, first + strip)
        sizes, numbers, _, flags = segments[:, ends[first] : ends[min(first + strip, len(places))]]
        ids, document_ids, position_ids = (
            field[at].reshape(-1) for field in (rows.ids, rows.document_ids, rows.position_ids)
        )
        stops = np.cumsum(sizes)
        begins = stops - sizes
        document_ids[:] = np.repeat(numbers, sizes)
        np.subtract(columns[: len(ids)], np.repeat(begins, sizes), out=position_ids)
        ids[begins[flags & _BEGINS > 0]] = BOS
        ids[stops[flags & _ENDS > 0] - 1] = EOS
        is_padding = numbers == 0
        lengths = sizes[is_padding]
        before = np.cumsum(lengths) - lengths
        padding = np.repeat(begins[is_padding] - before, lengths)
        padding += columns[: len(padding)]
        ids[padding], position_ids[padding] = PAD, 0


def _segments(picks: Sequence[tuple[Visit, Ints, Ints]], length: int) -> tuple[Ints, Ints]:
    """Cover every position of every row by pieces and padding, rows in the order of `picks`.

    Returns:
        int64 [4, segments]: size, number of the document in the row (0 for padding), place of the first id, flags; and
        int64 [rows]: segments per row.
    """
    found = [visit.pieces_of(numbers) for visit, numbers, _ in picks]
    per_row = np.concatenate([counts for _, counts in found])
    sources, sizes, flags = np.concatenate([pieces for pieces, _ in found], axis=1)
    firsts = np.cumsum(per_row) - per_row
    row = np.repeat(np.arange(len(per_row)), per_row)
    segments = np.zeros((4, len(row) + len(per_row)), dtype=np.int64)
    of_pieces = np.arange(len(row)) + row
    segments[0, of_pieces], segments[2, of_pieces], segments[3, of_pieces] = sizes, sources, flags
    segments[1, of_pieces] = np.arange(len(row)) - firsts[row] + 1
    segments[0, firsts + per_row + np.arange(len(per_row))] = length - np.add.reduceat(sizes, firsts)
    return segments, per_row + 1


def _read_ids(picks: Sequence[tuple[Visit, Ints, Ints]], segments: Ints, per_row: Ints, ids: Ints) -> None:
    """Read the ids of all pieces; what is left where symbols and padding belong, is anything."""
    length = ids.shape[1]
    columns = np.arange(max(len(numbers) for _, numbers, _ in picks) * length)
    sizes = segments[0]
    shifts = segments[2] - (np.cumsum(sizes) - sizes)
    ends = np.concatenate(([0], np.cumsum(per_row))).tolist()
    first = 0
    for visit, numbers, places in picks:
        last = first + len(numbers)
        own = slice(ends[first], ends[last])
        at = np.repeat(shifts[own] + first * length, sizes[own])
        at += columns[: len(at)]
        ids[places] = visit.ids_at(at).reshape(-1, length)
        first = last
