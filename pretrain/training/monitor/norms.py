"""Norms of one step by group of parameters: of gradients before clipping, of weights, and of their update.

A rank looks only at the values that it owns (without sharding the ranks take turns), and at what they become: no
optimizer is asked how it moves. Nothing is communicated here, and nothing waits for a device.
"""

import torch
from torch import Tensor

from pretrain.model.summary import GROUPS, group_of
from pretrain.training.zero.engine import Engine

QUANTITIES = ("gradient", "weight", "update")
SAMPLE = 2**18
"""Elements of what a rank owns of a parameter whose update is looked at: a copy of all might not fit into memory."""


class Inspection:
    """Look at one step. While the optimizer moves the weights, it holds a copy of at most SAMPLE elements of each."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.squares = torch.zeros(len(QUANTITIES), len(GROUPS), device=engine.device, dtype=torch.float64)
        """Sums of squares over what this rank owns; over all ranks they add up."""

    def before_update(self) -> None:
        """Gradients are complete, and the optimizer has not moved."""
        partition = self._engine.partition
        self._own = list(partition.own(partition.weights()))
        gradients = partition.own_gradients()
        self._before = [sample(piece.tensor).clone() for piece in self._own]
        self._add("gradient", [gradients[piece.parameter] for piece in self._own])
        self._add("weight", self._before)

    def after_update(self) -> None:
        """The optimizer has moved."""
        for before, piece in zip(self._before, self._own, strict=True):
            before.sub_(sample(piece.tensor))
        self._add("update", self._before)
        del self._before, self._own

    def _add(self, quantity: str, tensors: list[Tensor]) -> None:
        """Squares of these, which are all or a sample of what is owned: each counts for as many elements."""
        if tensors:
            norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors])
            norms = norms.to(self.squares.device)  # from the host, where the optimizer is offloaded
            pairs = list(zip(self._own, tensors, strict=True))
            counts = [piece.tensor.numel() / max(tensor.numel(), 1) for piece, tensor in pairs]
            squares = norms.double().square() * torch.tensor(counts, dtype=torch.float64, device=norms.device)
            groups = [GROUPS.index(group_of(piece.parameter)) for piece in self._own]
            self.squares[QUANTITIES.index(quantity)].index_add_(0, torch.tensor(groups, device=norms.device), squares)


def sample(tensor: Tensor) -> Tensor:
    """Every k-th element of a flat tensor, at most SAMPLE of them.

    An odd k does not come back to the same columns of a matrix whose rows are a power of two long.
    """
    k = -(-tensor.numel() // SAMPLE)
    return tensor[:: max(k + 1 - k % 2, 1)]


def summarize_squares(squares: list[list[float]]) -> dict[str, dict[str, float]]:
    """Turn sums of squares over all ranks into gradient norm and update/weight ratio of each group that there is."""
    gradient, weight, update = squares
    there = [number for number, square in enumerate(weight) if square > 0]
    return {
        "grad_norms": {GROUPS[n]: gradient[n] ** 0.5 for n in there},
        "update_ratios": {GROUPS[n]: (update[n] / weight[n]) ** 0.5 for n in there},
    }
