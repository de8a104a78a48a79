"""Norms of one step by group of parameters: of gradients before clipping, of weights, and of their update.

A rank looks only at the values that it owns (without sharding the ranks take turns), and at what they become: no
optimizer is asked how it moves. Nothing is communicated here, and nothing waits for a device.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.model.summary import GROUPS, group_of
from pretrain.training.engine import Engine, place_in
from pretrain.training.fragments import Fragment, fragments

QUANTITIES = ("gradient", "weight", "update")
SAMPLE = 2**18
"""Elements of what a rank owns of a parameter whose update is looked at: a copy of all might not fit into memory."""


class Inspection:
    """Of one step. While the optimizer moves the weights, it holds a copy of at most SAMPLE elements of each."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.squares = torch.zeros(len(QUANTITIES), len(GROUPS), device=engine.device, dtype=torch.float64)
        """Sums of squares over what this rank owns; over all ranks they add up."""

    def before_update(self) -> None:
        """Gradients are complete, and the optimizer has not moved."""
        self._own = list(own_weights(self._engine))
        gradients = own_gradients(self._engine)
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
    """Of a flat tensor, every k-th element, at most SAMPLE of them.

    An odd k does not come back to the same columns of a matrix whose rows are a power of two long.
    """
    k = -(-tensor.numel() // SAMPLE)
    return tensor[:: max(k + 1 - k % 2, 1)]


def own_weights(engine: Engine) -> Iterator[Fragment]:
    """The fp32 weights that this rank looks at: on all ranks together, each value once."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    weights = [fragment for fragment in fragments(engine) if fragment.kind == "weight"]
    for number, fragment in enumerate(weights):
        if engine.stage > 0 or number % world_size == rank:
            yield fragment


def own_gradients(engine: Engine) -> dict[str, Tensor]:
    """By parameter, the gradient of what this rank owns of it, flattened; between backward and step.

    It is the mean over ranks, as the engine's own norm sees it: not clipped yet.
    """
    parameters: dict[str, Any] = dict(engine.module.named_parameters())
    if engine.stage == 0:
        return {name: parameter.grad.view(-1) for name, parameter in parameters.items()}
    if engine.config.training.offload != "none":
        return _offloaded_gradients(engine)
    averaged = engine.zero.averaged_gradients
    if engine.stage == 3:
        of_parameter = {
            id(parameter): gradient
            for number, group in enumerate(engine.zero.fp16_groups)
            for parameter, gradient in zip(group, averaged[number], strict=True)
        }
        # A partition ends in padding that belongs to no parameter.
        return {name: of_parameter[id(p)][: _held(p)] for name, p in parameters.items()}
    at = {number: _by_offset(gradients) for number, gradients in averaged.items()}
    found = {}
    for name, parameter in parameters.items():
        if (mapping := parameter._hp_mapping) is not None:
            address = mapping.get_hp_fragment_address()
            found[name] = at[mapping.param_group_index][address.start].view(-1)[: address.numel]
    return found


def _offloaded_gradients(engine: Engine) -> dict[str, Tensor]:
    """They are on the host in fp32, laid out as the master weights."""
    flat: list[Any] = [tensor for _, tensor in engine.flat_parameters()]
    found = {}
    for fragment in fragments(engine):
        if fragment.kind == "weight":
            number, offset = place_in(fragment.tensor, flat)
            found[fragment.parameter] = flat[number].grad.view(-1)[offset : offset + fragment.tensor.numel()]
    return found


def _by_offset(gradients: list[Tensor]) -> dict[int, Tensor]:
    """The gradients of a group, by where they begin in the rank's part of it."""
    offset, found = 0, {}
    for gradient in gradients:
        found[offset] = gradient
        offset += gradient.numel()
    return found


def _held(parameter: Any) -> int:
    """Elements of a parameter in this rank's partition of it."""
    size, rank = parameter.ds_tensor.ds_numel, dist.get_rank() if dist.is_initialized() else 0
    return max(0, min(parameter.ds_numel - rank * size, size))


def summarize(squares: list[list[float]]) -> dict[str, dict[str, float]]:
    """From sums of squares over all ranks: gradient norm and update/weight ratio of each group that there is."""
    gradient, weight, update = squares
    there = [number for number, square in enumerate(weight) if square > 0]
    return {
        "grad_norms": {GROUPS[n]: gradient[n] ** 0.5 for n in there},
        "update_ratios": {GROUPS[n]: (update[n] / weight[n]) ** 0.5 for n in there},
    }
