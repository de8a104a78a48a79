"""`AttentionLayout`: what attention needs to know about a batch, worked out once and shared by all layers."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretrain.batch import Batch


@dataclass(frozen=True)
class AttentionLayout:
    """Where documents lie in the rows of a batch. B rows, L positions."""

    document_ids: Tensor
    """int64 [B, L]; 0 is padding."""
    position_ids: Tensor
    """int64 [B, L]; from 0 in each document."""
    reversal: Tensor
    """int64 [B, L]: the index in the row of the mirror image of a position inside its document; itself in padding.
    It is its own inverse."""
    one_document_per_row: bool
    """Every row is one document from column 0, then padding."""
    padded: bool
    """There is padding somewhere."""

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
        return cls(
            document_ids=documents,
            position_ids=positions,
            reversal=mirrored,
            one_document_per_row=bool((documents <= 1).all() and (first_column[inside] == 0).all()),
            padded=not bool(inside.all()),
        )

    def to(self, device: torch.device) -> "AttentionLayout":
        """The same layout on `device`."""
        return replace(
            self,
            document_ids=self.document_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            reversal=self.reversal.to(device, non_blocking=True),
        )
