"""Rearrangement of positions and its inverse, as one differentiable gather each way.

Autograd's own backward of a gather adds into zeros, position by position. Here every position has at most one place
to go, so the backward pass is a gather as well. What is moved, and why, is the layout's business.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rearrangement:
    """Places [S] filled from positions [N], each position going to at most one place."""

    index: Tensor
    """int64 [S]: the position that a place is filled from; anything where the place is a hole."""
    inverse: Tensor
    """int64 [N]: the place that a position goes to; anything where it is dropped."""
    holes: Tensor | None = None
    """int64: places that nothing goes to; they are zero. None: there are none."""
    dropped: Tensor | None = None
    """int64: positions that go nowhere. None: there are none."""

    def apply(self, x: Tensor) -> Tensor:
        """Move [N, ...] -> [S, ...], zero in holes."""
        return _Gather.apply(x, self)

    @property
    def inverted(self) -> "Rearrangement":
        """Rearrangement of places back to positions."""
        return Rearrangement(self.inverse, self.index, self.dropped, self.holes)

    def to(self, device: torch.device) -> "Rearrangement":
        """Return the same on `device`."""
        parts = (self.index, self.inverse, self.holes, self.dropped)
        return Rearrangement(*(t if t is None else t.to(device, non_blocking=True) for t in parts))  # type: ignore[arg-type]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rearrangement: Rearrangement) -> Tensor:
        moved = x.index_select(0, rearrangement.index)
        return moved if rearrangement.holes is None else moved.index_fill_(0, rearrangement.holes, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Rearrangement], output: Tensor) -> None:  # noqa: ARG004
        ctx.rearrangement = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.rearrangement.inverted.apply(gradient), None


def rearrange(source: Tensor, places: Tensor, num_positions: int, num_places: int) -> Rearrangement:
    """Return what sends position `source[t]` to place `places[t]`, both int64 [T] without repetition."""
    index, inverse = torch.zeros(num_places, dtype=torch.int64), torch.zeros(num_positions, dtype=torch.int64)
    index[places], inverse[source] = source, places

    def absent(present: Tensor, count: int) -> Tensor | None:
        if len(present) == count:
            return None
        return torch.ones(count, dtype=torch.bool).index_fill_(0, present, False).nonzero().flatten()

    return Rearrangement(index, inverse, absent(places, num_places), absent(source, num_positions))
