"""Documents -> rows: which piece of which document becomes which row.

A row here is padded: one document, or one chunk of a document longer than a row. A document is its ids between a
begin and an end symbol.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.data.counter_random import permutation

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowPlan:
    """The rows of one visit to one shard, in their order; every field is int64 [rows]."""

    samples: Ints
    """Which document of the shard."""
    starts: Ints
    """First position of the chunk, in the document with its begin symbol at 0."""
    lengths: Ints
    """Positions of the chunk, begin and end symbols included."""

    def __len__(self) -> int:
        return len(self.samples)


def plan_rows(document_lengths: Ints, sequence_length: int, *key: int) -> RowPlan:
    """Cut every document into chunks of at most `sequence_length` and put all chunks into a random order.

    Args:
        document_lengths: int64 [documents], ids per document without begin and end symbols.
        sequence_length: positions per row.
        key: decides the order, and nothing else does.
    """
    with_symbols = document_lengths + 2
    chunks = -(-with_symbols // sequence_length)
    samples = np.repeat(np.arange(len(document_lengths)), chunks)
    first_chunk = np.repeat(np.cumsum(chunks) - chunks, chunks)
    starts = (np.arange(len(samples)) - first_chunk) * sequence_length
    lengths = np.minimum(with_symbols[samples] - starts, sequence_length)
    order = permutation(len(samples), *key)
    return RowPlan(samples[order], starts[order], lengths[order])
