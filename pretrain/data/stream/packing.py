"""Documents -> rows: which pieces of which documents become which row, as a pure function of their lengths and a key.

A document is its ids between a begin and an end symbol. What is longer than a row is cut, and every piece is used.
Nothing here reads a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from pretrain.data.arrays import Floats, Ints
from pretrain.data.counter_random import PlanChoice, order_within, permutation, uniform


@dataclass(frozen=True)
class PackingRule:
    """How documents become rows in one phase of a run; the fields are those of `DataConfig`."""

    sequence_length: int
    packing: Literal["padded", "packed", "concatenated"] = "padded"
    cut: Literal["full", "even"] = "full"
    source_weights: tuple[float, ...] = ()
    """How often a document is read each time its shard is, by the number of its source; empty: once."""


@dataclass(frozen=True)
class Spans:
    """Stretches of documents that are to be put into rows; every field is int64 [spans]."""

    samples: Ints
    """Number of the document in the shard."""
    starts: Ints
    """First position, in the document with its begin symbol at 0."""
    stops: Ints
    """One past the last position."""


@dataclass(frozen=True)
class RowPlan:
    """The rows of one visit to one shard, in their order; P pieces, in the order in which rows hold them."""

    samples: Ints
    """int64 [P]: which document of the shard."""
    starts: Ints
    """int64 [P]: first position of the piece, in the document with its begin symbol at 0."""
    lengths: Ints
    """int64 [P]: positions of the piece, begin and end symbols included."""
    bounds: Ints
    """int64 [rows + 1]: row r holds the pieces bounds[r] .. bounds[r + 1] - 1."""

    def __len__(self) -> int:
        return len(self.bounds) - 1


def whole_documents(document_lengths: Ints, repeats: Ints | None = None) -> Spans:
    """Return every document once, or `repeats` int64 [documents] times; lengths are without begin and end symbols."""
    samples = np.arange(len(document_lengths))
    samples = samples if repeats is None else np.repeat(samples, repeats)
    return Spans(samples, np.zeros(len(samples), dtype=np.int64), document_lengths[samples] + 2)


def repeats_of(weights: Floats, epoch: int, *key: int) -> Ints:
    """Return how often each document is read in an epoch, int64 [documents].

    In e epochs that is e x weight times, to within one.
    """
    phase = uniform(*key, np.arange(len(weights)))
    return (np.floor((epoch + 1) * weights + phase) - np.floor(epoch * weights + phase)).astype(np.int64)


def remaining_spans(plan: RowPlan, rows: int) -> Spans:
    """Return what is left of a plan after its first `rows` rows; neighbouring pieces of a document are joined again."""
    first = plan.bounds[rows]
    samples, starts = plan.samples[first:], plan.starts[first:]
    stops = starts + plan.lengths[first:]
    order = np.lexsort((starts, samples))
    samples, starts, stops = samples[order], starts[order], stops[order]
    begins = np.ones(len(samples), dtype=np.bool_)
    begins[1:] = (samples[1:] != samples[:-1]) | (starts[1:] != stops[:-1])
    ends = np.roll(begins, -1)
    return Spans(samples[begins], starts[begins], stops[ends])


def plan_rows(spans: Spans, rule: PackingRule, *key: int) -> RowPlan:
    """Put all spans into rows, in a random order.

    `padded` gives every piece a row of its own. `packed` puts pieces together, each in the fullest row that still
    holds it, long ones first; no document is cut that fits into a row. `concatenated` writes all spans one after
    another and cuts wherever a row is full.

    Args:
        spans: what to put into rows.
        rule: the length of a row, and how to fill it.
        key: decides the order, and nothing else does.
    """
    if rule.packing == "concatenated":
        order = permutation(len(spans.samples), *key, PlanChoice.DOCUMENT_ORDER)
        plan = _concatenate(spans, rule.sequence_length, order)
    else:
        plan = _one_piece_per_row(_cut(spans, rule))
        if rule.packing == "packed":
            plan = _best_fit(plan, rule.sequence_length, *key)
    return _in_random_order(plan, *key)


def _cut(spans: Spans, rule: PackingRule) -> Spans:
    """Cut what is longer than a row: into full rows and a rest, or into pieces of even length."""
    sizes = spans.stops - spans.starts
    pieces = -(-sizes // rule.sequence_length)
    of_span = np.repeat(np.arange(len(sizes)), pieces)
    nth = np.arange(len(of_span)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    if rule.cut == "even":
        begin, end = (sizes[of_span] * n // pieces[of_span] for n in (nth, nth + 1))
    else:
        begin, end = nth * rule.sequence_length, np.minimum((nth + 1) * rule.sequence_length, sizes[of_span])
    return Spans(spans.samples[of_span], spans.starts[of_span] + begin, spans.starts[of_span] + end)


def _one_piece_per_row(pieces: Spans) -> RowPlan:
    return RowPlan(pieces.samples, pieces.starts, pieces.stops - pieces.starts, np.arange(len(pieces.samples) + 1))


def _concatenate(spans: Spans, sequence_length: int, order: Ints) -> RowPlan:
    samples, starts = spans.samples[order], spans.starts[order]
    ends = np.cumsum(spans.stops[order] - starts)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(sequence_length, total, sequence_length))
    begins = np.concatenate((np.zeros(min(1, len(cuts)), dtype=np.int64), cuts[:-1]))
    of_span = np.searchsorted(ends, begins, side="right")
    before = np.concatenate(([0], ends[:-1]))[of_span] if len(ends) else ends
    bounds = np.searchsorted(begins, np.arange(-(-total // sequence_length) + 1) * sequence_length)
    return RowPlan(samples[of_span], starts[of_span] + begins - before, cuts - begins, bounds)


def _best_fit(plan: RowPlan, sequence_length: int, *key: int) -> RowPlan:
    """Best-fit decreasing, decided for the histogram of lengths; which piece of a length goes where is random."""
    values, counts = np.unique(plan.lengths, return_counts=True)
    rows = _fill_rows(values[::-1].tolist(), counts[::-1].tolist(), sequence_length)
    repeats = np.array([count for count, _ in rows], dtype=np.int64)
    sizes = np.array([len(row) for _, row in rows], dtype=np.int64)
    lengths = np.array([length for _, row in rows for length in row], dtype=np.int64)
    pieces_per_row = np.repeat(sizes, repeats)
    bounds = np.concatenate(([0], np.cumsum(pieces_per_row)))
    kinds = np.repeat(np.cumsum(sizes) - sizes, repeats) - bounds[:-1]
    slots = lengths[np.repeat(kinds, pieces_per_row) + np.arange(bounds[-1])]
    chosen = np.empty(len(slots), dtype=np.int64)
    chosen[np.argsort(slots, kind="stable")] = order_within(plan.lengths, *key, PlanChoice.WHICH_PIECE)
    return RowPlan(plan.samples[chosen], plan.starts[chosen], plan.lengths[chosen], bounds)


class _OpenRows:
    """Rows that are not full, by the room that is left in them; of equal ones only how many there are."""

    def __init__(self) -> None:
        self._by_room: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        self._rooms = 0
        """Bit r says that there are rows with r left."""

    def put(self, count: int, lengths: tuple[int, ...], room: int) -> None:
        """Add `count` rows that hold pieces of these lengths, with `room` left in each."""
        self._by_room.setdefault(room, []).append((count, lengths))
        self._rooms |= 1 << room

    def take(self, least: int) -> tuple[int, tuple[int, ...], int] | None:
        """Take away what `put` was given: rows with the smallest room that is at least `least`; None without any."""
        fitting = self._rooms >> least
        if not fitting:
            return None
        room = least + (fitting & -fitting).bit_length() - 1
        count, lengths = self._by_room[room].pop()
        if not self._by_room[room]:
            self._rooms ^= 1 << room
        return count, lengths, room

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        return chain.from_iterable(self._by_room.values())


def _fill_rows(lengths: list[int], counts: list[int], sequence_length: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return equal rows as (how many, the lengths in each), for `counts` pieces of each of the falling `lengths`.

    Working on counts instead of pieces, as Krell et al. (arXiv 2107.02027) do, makes the time independent of their
    number.
    """
    rows = _OpenRows()
    for length, left in zip(lengths, counts, strict=True):
        while left and (found := rows.take(length)):
            count, row, room = found
            per_row = min(room // length, left)
            filled = min(count, left // per_row)
            if count > filled:
                rows.put(count - filled, row, room)
            rows.put(filled, row + (length,) * per_row, room - per_row * length)
            left -= filled * per_row
        per_row = sequence_length // length
        for pieces, count in ((per_row, left // per_row), (left % per_row, 1)):
            if pieces and count:
                rows.put(count, (length,) * pieces, sequence_length - pieces * length)
    return list(rows)


def _in_random_order(plan: RowPlan, *key: int) -> RowPlan:
    """Shuffle rows, and the pieces inside each: neither order says anything about lengths."""
    sizes = np.diff(plan.bounds)
    new_place = np.empty(len(plan), dtype=np.int64)
    order = permutation(len(plan), *key, PlanChoice.ROW_ORDER)
    new_place[order] = np.arange(len(plan))
    pieces = order_within(np.repeat(new_place, sizes), *key, PlanChoice.ORDER_IN_ROW)
    bounds = np.concatenate(([0], np.cumsum(sizes[order])))
    return RowPlan(plan.samples[pieces], plan.starts[pieces], plan.lengths[pieces], bounds)
