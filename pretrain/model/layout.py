"""`AttentionLayout`: what attention needs to know about a batch, worked out once and shared by all layers.

What only some kernels need (indices that unpack documents, masks of windows) is built when one first asks for it, and
kept with the layout. How scores are computed is not decided here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.model.rearrange import Rearrangement, rearrange
from pretrain.model.sequence_parallel import SequenceGroup

_T = TypeVar("_T")
_SHORT = 64
"""Tokens up to which documents share a bucket whatever their lengths: a call more would cost more than padding."""
_FULLNESS = 0.75
"""Share of a bucket's longest document that another must have to join it."""


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length, as consecutive places [documents, longest] of the unpacked batch."""

    documents: int
    longest: int
    filled: Tensor | None
    """bool [documents, longest]: the place holds a token. None: every place does."""


@dataclass(frozen=True)
class Unpacked:
    """Documents of a batch one by one, right-padded within their bucket."""

    buckets: list[Bucket]
    forward: Rearrangement
    """Rows, flattened to [B x L], to the places of all buckets."""
    backward: Rearrangement
    """Rearrangement like `forward`, with every document reversed."""
    in_place: bool
    """Whether the places are the positions: documents of one length fill the rows."""


@dataclass(frozen=True)
class AttentionLayout:
    """Places of the documents in the rows of a batch. B rows, L positions."""

    document_ids: Tensor
    """int64 [B, L]; 0 is padding."""
    position_ids: Tensor
    """int64 [B, L]; from 0 in each document."""
    reversal: Tensor
    """int64 [B, L]: the index in the row of the mirror image of a position inside its document; itself in padding.
    It is its own inverse."""
    document_starts: tuple[int, ...]
    """Index of each document's first position in the flattened rows [B x L], for all of the batch in order."""
    document_lengths: tuple[int, ...]
    """Tokens of the same documents."""
    one_document_per_row: bool
    """Whether every row is one document from column 0, then padding."""
    padded: bool
    """Whether there is padding anywhere."""
    shared_by: SequenceGroup | None = field(default=None, compare=False)
    """Ranks that each hold some positions of the rows; the layout is that of whole rows. None: this rank has all."""
    _built: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_batch(cls, batch: Batch) -> "AttentionLayout":
        """Work out the layout; cheapest before the batch goes to its device, since it looks at values.

        Raises:
            ValueError: the positions do not count up from 0 in every document.
        """
        documents, positions = batch.document_ids, batch.position_ids
        rows, length = documents.shape
        columns = torch.arange(length, device=documents.device)
        inside = documents != 0
        first_column = columns - positions
        begins = torch.ones_like(inside)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        expected = torch.where(begins, columns, 0).cummax(dim=1).values
        if not torch.equal(first_column[inside], expected[inside]):
            raise ValueError("position_ids must count up from 0 inside every document of document_ids")
        # Documents are numbered over the whole batch by the flat index of their first position.
        row_offsets = torch.arange(rows, device=documents.device)[:, None] * length
        begin = (row_offsets + first_column)[inside]
        lengths = torch.bincount(begin, minlength=rows * length)
        mirrored = columns.expand(rows, length).clone()
        mirrored[inside] += lengths[begin] - 1 - 2 * positions[inside]
        starts = lengths.nonzero().flatten()
        return cls(
            document_ids=documents,
            position_ids=positions,
            reversal=mirrored,
            document_starts=tuple(starts.tolist()),
            document_lengths=tuple(lengths[starts].tolist()),
            one_document_per_row=bool((documents <= 1).all() and (first_column[inside] == 0).all()),
            padded=not bool(inside.all()),
        )

    def to(self, device: torch.device) -> "AttentionLayout":
        """Return the same layout on `device`."""
        return replace(
            self,
            document_ids=self.document_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            reversal=self.reversal.to(device, non_blocking=True),
            _built={},
        )

    def over(self, ranks: SequenceGroup) -> "AttentionLayout":
        """Return the same layout for rows that are spread over some ranks."""
        return replace(self, shared_by=ranks, _built={})

    def own(self, x: Tensor) -> Tensor:
        """Return what this rank holds of a tensor over whole rows, [B, L, ...] -> [B, L or L/S, ...]."""
        return x if self.shared_by is None else self.shared_by.own(x)

    def once(self, key: Any, build: Callable[[], _T]) -> _T:
        """Return what `build` returns, built at the first call with `key` and kept for all layers."""
        if key not in self._built:
            self._built[key] = build()
        return self._built[key]

    @property
    def device(self) -> torch.device:
        """Device of the layout's tensors."""
        return self.document_ids.device

    @cached_property
    def mirrored(self) -> Rearrangement:
        """Rearrangement of the flattened rows that reverses every document in its own place."""
        rows, length = self.reversal.shape
        flat = (self.reversal + torch.arange(rows, device=self.device)[:, None] * length).flatten()
        return Rearrangement(flat, flat)

    @cached_property
    def tokens(self) -> tuple[Rearrangement, Rearrangement]:
        """Rearrangements of flattened rows to tokens [T] without padding: in order, and with documents reversed."""
        positions, numbers = self._positions_of_tokens
        count = len(positions)
        starts = torch.cumsum(self._lengths, 0) - self._lengths
        offsets = torch.arange(count) - starts[numbers]
        reversed_places = starts[numbers] + self._lengths[numbers] - 1 - offsets
        total = self.document_ids.numel()
        in_order, in_reverse = (rearrange(positions, p, total, count) for p in (torch.arange(count), reversed_places))
        return in_order.to(self.device), in_reverse.to(self.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Index of each document's first token among the tokens, and their number; int32 [N + 1]."""
        return torch.nn.functional.pad(self._lengths.cumsum(0), (1, 0)).to(self.device, torch.int32)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document; 0 in a batch of padding."""
        return max(self.document_lengths, default=0)

    @cached_property
    def first_positions(self) -> Tensor:
        """Flat index of the first position of a position's document, its own in padding; int64 [B x L]."""
        own = torch.arange(self.document_ids.numel(), device=self.device)
        return torch.where(self.document_ids.flatten() != 0, own - self.position_ids.flatten(), own)

    @cached_property
    def unpacked(self) -> Unpacked:
        """Documents, gathered into a few rectangles, so that padding is bounded however their lengths differ.

        Sorted by length, a document starts a new bucket if it is shorter than 3/4 of the longest in the current one:
        at least 3/4 of the places are filled but among the shortest documents, in O(log(longest / shortest)) calls.
        """
        lengths = self._lengths
        order = lengths.argsort(descending=True, stable=True)
        bounds = [0]
        for number, length in enumerate(lengths[order].tolist()):
            longest = int(lengths[order[bounds[-1]]])
            if longest > _SHORT and length < _FULLNESS * longest:
                bounds.append(number)
        bounds.append(len(order))
        first_place, buckets, places = torch.zeros_like(lengths), [], 0
        for low, high in pairwise(bounds):
            if low == high:
                continue
            inside = lengths[order[low:high]]
            longest = int(inside[0])
            first_place[order[low:high]] = places + torch.arange(high - low) * longest
            filled = None if int(inside[-1]) == longest else (torch.arange(longest) < inside[:, None]).to(self.device)
            buckets.append(Bucket(high - low, longest, filled))
            places += (high - low) * longest
        positions, numbers = self._positions_of_tokens
        offsets = positions - torch.tensor(self.document_starts, dtype=torch.int64)[numbers]
        total = self.document_ids.numel()
        forward = rearrange(positions, first_place[numbers] + offsets, total, places)
        mirrored = first_place[numbers] + lengths[numbers] - 1 - offsets
        backward = rearrange(positions, mirrored, total, places)
        in_place = torch.equal(forward.index, torch.arange(total))
        return Unpacked(buckets, forward.to(self.device), backward.to(self.device), in_place)

    @cached_property
    def _lengths(self) -> Tensor:
        """Tokens of each document, int64 [N] on the CPU."""
        return torch.tensor(self.document_lengths, dtype=torch.int64)

    @cached_property
    def _positions_of_tokens(self) -> tuple[Tensor, Tensor]:
        """Flat position of every token and number of its document; int64 [T] on the CPU."""
        lengths = self._lengths
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        first_token = torch.cumsum(lengths, 0) - lengths
        starts = torch.tensor(self.document_starts, dtype=torch.int64)
        return torch.arange(len(numbers)) + (starts - first_token)[numbers], numbers
