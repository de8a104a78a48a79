"""Batch: what crosses from data to model. Nothing else does."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORED = -100
"""The label of a position that is not to be predicted."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens; every field is int64 [B, L]."""

    input_ids: Tensor
    """Token ids, after masking."""
    labels: Tensor
    """The id to predict at masked positions, IGNORED elsewhere."""
    document_ids: Tensor
    """1, 2, ... for the documents of a row in order; 0 is padding, which comes last."""
    position_ids: Tensor
    """Position inside the document, from 0; 0 in padding."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on `device`, copied without waiting where the source is pinned."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def pin_memory(self) -> "Batch":
        """Return the same batch in page-locked memory, from where copies to a GPU need not be waited for."""
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))

    def split(self, rows: int) -> Iterator["Batch"]:
        """Yield consecutive batches of at most `rows` rows."""
        for start in range(0, len(self), rows):
            yield Batch(*(getattr(self, field.name)[start : start + rows] for field in fields(self)))

    @property
    def num_masked(self) -> int:
        """Number of positions to predict."""
        return int((self.labels != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """Number of positions that are not padding."""
        return int((self.document_ids != 0).sum())
