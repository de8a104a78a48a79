"""The gradients and weights that a rank owns, at every ZeRO stage, between backward and step."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pretrain.training.zero.engine import Engine
from pretrain.training.zero.fragments import Fragment, fragments
from pretrain.training.zero.layout import place_in


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
