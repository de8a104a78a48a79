"""Sequence parallelism (Ulysses, Jacobs et al., arXiv 2309.14509): a row spread over ranks, and what these exchange.

Each of S ranks holds L/S consecutive positions of every row, and computes with them whatever treats positions one by
one. For attention the ranks exchange positions for heads: each then has whole rows of n/S heads, both sub-heads of
each, so reversal, documents and windows are as on one rank. Which rows a rank reads is the data's business.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch


@dataclass(frozen=True)
class SequenceGroup:
    """Ranks that share their rows, seen from one of them."""

    group: dist.ProcessGroup
    size: int
    """Number of ranks, S."""
    index: int
    """Number of this rank in the group, from 0: it holds the positions [index x L/S, (index + 1) x L/S)."""

    @classmethod
    def join(cls, size: int, timeout: timedelta) -> "SequenceGroup | None":
        """Form groups of `size` neighbouring ranks and return that of this rank, None if `size` is 1; collective.

        Its collectives fail when they take longer than `timeout`.
        """
        if size == 1:
            return None
        group, _ = dist.new_subgroups(size, timeout=timeout)
        assert group is not None
        return cls(group, size, dist.get_rank(group))

    def own(self, x: Tensor) -> Tensor:
        """Return this rank's positions: [B, L, ...] -> a view, [B, L/S, ...]; S must divide L."""
        return x.unflatten(1, (self.size, -1))[:, self.index]

    def own_positions(self, batch: Batch) -> Batch:
        """Return this rank's positions of every row."""
        fields = (batch.input_ids, batch.labels, batch.document_ids, batch.position_ids)
        return Batch(*(self.own(field) for field in fields))

    def to_heads(self, x: Tensor) -> Tensor:
        """Exchange some positions of all heads for all of some heads: [B, L/S, n, d] -> [B, L, n/S, d]; collective."""
        parts = x.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4)
        return _Exchange.apply(parts, self.group).movedim(0, 1).flatten(1, 2)

    def to_positions(self, x: Tensor) -> Tensor:
        """Undo `to_heads`: [B, L, n/S, d] -> [B, L/S, n, d]; collective."""
        parts = x.unflatten(1, (self.size, -1)).movedim(1, 0)
        return _Exchange.apply(parts, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """Parts [S, ...]: the j-th goes to rank j, and the j-th of the result comes from rank j. Its own transpose."""

    @staticmethod
    def forward(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, dist.ProcessGroup], output: Tensor) -> None:  # noqa: ARG004
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradient, ctx.group), None
