"""Interventions: ways to read rows longer than those trained on that touch no weight, and encoders with a triangle off.

An intervention is set for rows of one length and taken back afterwards. `plain` is the encoder as it was trained.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pretrain.config.model import ModelConfig
from pretrain.evaluation.report.titles import Intervention
from pretrain.model.encoder import Block, Encoder
from pretrain.model.kernels import TRIANGLES
from pretrain.model.rotary import RotaryScaling

INTERVENTIONS: tuple[Intervention, ...] = (
    "interpolation",
    "ntk",
    "dynamic_ntk",
    "yarn",
    "dropped",
    "log_length",
    "windowed",
)

ABLATIONS: tuple[Intervention, ...] = ("without_past", "without_future")

_SCALINGS = ("interpolation", "ntk", "dynamic_ntk", "yarn")

FACTORED = frozenset({"interpolation", "ntk", "yarn"})
"""Set for one longest length: at the training length they change the encoder too, by the same factor."""


def reason_against(intervention: Intervention, config: ModelConfig, training_length: int) -> str | None:
    """Why an intervention has no meaning for an encoder; None if it has one."""
    sees_far = any(layer.window is None or layer.window > training_length for layer in config.resolved_layers)
    if intervention in (*_SCALINGS, "dropped") and not config.rotates:
        return "no layer has rotary positions"
    if intervention == "dropped" and config.drop_positions_after is not None:
        return "the encoder drops its positions in training"
    rotates_far = any(
        layer.positions == "rotary" and (layer.window is None or layer.window > training_length)
        for layer in config.resolved_layers
    )
    if intervention in _SCALINGS and not rotates_far:
        return "every rotary layer is limited to a window that it was trained on"
    if intervention in ("log_length", "windowed") and not sees_far:
        return "no layer sees further than the training length"
    if intervention in ABLATIONS and config.attention != "dual_triangle":
        return f"{config.attention} attention has no two triangles"
    return None


@contextmanager
def intervene(
    encoder: Encoder, intervention: Intervention, length: int, training_length: int, factor: float = 1.0
) -> Iterator[None]:
    """Read rows of `length` so inside; the encoder is as before afterwards.

    Args:
        encoder: to be changed and restored.
        intervention: which.
        length: positions of the rows.
        training_length: positions of the rows trained on.
        factor: of the rotary scalings: longest length that they are set for / training length.
    """
    before = (encoder.rotary_scaling, encoder.positions_dropped, encoder.layers)
    blocks: list[Any] = list(encoder.blocks)
    windows, scales = [b.attention.window for b in blocks], [b.attention.query_scale for b in blocks]
    hooks = []
    try:
        if intervention in _SCALINGS:
            kind: Any = intervention
            encoder.rotary_scaling = RotaryScaling(kind, max(factor, 1.0), training_length)
        elif intervention == "dropped":
            encoder.positions_dropped = True
        elif intervention == "log_length":
            _scale_by_log_length(encoder, length, training_length)
        elif intervention == "windowed":
            _limit_windows(encoder, training_length)
        elif intervention in ABLATIONS:
            side = "past" if intervention == "without_past" else "future"
            hooks = [_switch_off(block, side) for block in blocks]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        encoder.rotary_scaling, encoder.positions_dropped, encoder.layers = before
        for block, window, scale in zip(blocks, windows, scales, strict=True):
            block.attention.window, block.attention.query_scale = window, scale


def _scale_by_log_length(encoder: Encoder, length: int, training_length: int) -> None:
    """Layers that see further than they were trained to."""
    if length <= training_length:
        return
    for block, layer in zip(encoder.blocks, encoder.layers, strict=True):
        if layer.window is None or layer.window > training_length:
            assert isinstance(block, Block)
            reach = min(length, layer.window or length)
            block.attention.query_scale = math.log(reach) / math.log(training_length)


def _limit_windows(encoder: Encoder, window: int) -> None:
    encoder.layers = [
        layer.model_copy(update={"span": min(window, layer.window or window)}) for layer in encoder.layers
    ]
    for block, layer in zip(encoder.blocks, encoder.layers, strict=True):
        assert isinstance(block, Block)
        block.attention.window = layer.window


def _switch_off(block: Any, side: str) -> Any:
    """Zero what the sub-heads of a triangle give to the output projection."""
    config: ModelConfig = block.attention.config
    triangle = TRIANGLES[config.attention].index(side)

    def zeroed(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        parts = arguments[0].unflatten(-1, (config.num_heads, 2, config.sub_head_size)).clone()
        parts[..., triangle, :] = 0
        return (parts.flatten(-3),)

    return block.attention.output.register_forward_pre_hook(zeroed)
