"""What an encoder is made of: parameters by group, heads, layers. Counted from the real module on the meta device.

Nothing is allocated, so a model of any size is summarized in an instant. FLOPs are in `pretrain/training/flops.py`.
"""

from dataclasses import dataclass
from itertools import groupby

import torch

from pretrain.config import ModelConfig
from pretrain.model.encoder import MaskedLanguageModel

GROUPS = ("embedding", "attention", "feed-forward", "norms", "head", "other")
"""In the order of a forward pass; `other` holds what is none of these, and is there only where it is not empty."""


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters of one kind of component."""

    name: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Heads:
    """How attention divides the hidden width."""

    logical: int
    width: int
    """Of a logical head."""
    sub_heads: int
    """What has a softmax of its own: two per logical head under dual-triangle attention, else the head itself."""
    sub_head_width: int
    triangles: tuple[tuple[str, str], ...]
    """Name and reach of each sub-head of a logical head, in the order of its dimensions."""


@dataclass(frozen=True)
class Layers:
    """Consecutive layers that are alike."""

    first: int
    """Counted from 1."""
    last: int
    """Included."""
    span: str
    positions: str


@dataclass(frozen=True)
class ModelSummary:
    """What `diptych model show` tells of the module."""

    vocab_size: int
    groups: list[ParameterGroup]
    tied: bool
    """The head is the embedding matrix, which is counted once, there."""
    heads: Heads
    layers: list[Layers]

    @property
    def parameters(self) -> int:
        """Of all groups."""
        return sum(group.parameters for group in self.groups)


def summarize(config: ModelConfig, vocab_size: int) -> ModelSummary:
    """Build the module without its weights and look at it."""
    with torch.device("meta"):
        model = MaskedLanguageModel(config, vocab_size)
    sizes: dict[str, list[int]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        sizes[_group_of(name)].append(parameter.numel())
    return ModelSummary(
        vocab_size=vocab_size,
        groups=[ParameterGroup(n, len(s), sum(s)) for n, s in sizes.items() if s or n != "other"],
        tied=config.tie_embeddings,
        heads=_heads(config),
        layers=_layers(config),
    )


def _group_of(parameter: str) -> str:
    """The group of a parameter, by its dotted name."""
    parts = parameter.split(".")
    if any("norm" in part for part in parts):
        return "norms"
    if any("embedding" in part for part in parts):
        return "embedding"
    of_part = {"attention": "attention", "ffn": "feed-forward", "head": "head"}
    return next((group for part, group in of_part.items() if part in parts), "other")


def _heads(config: ModelConfig) -> Heads:
    triangles = {
        "dual_triangle": (("lower", "past and self"), ("upper", "self and future")),
        "causal": (("lower", "past and self"),),
        "bidirectional": (("full", "past, self and future"),),
    }[config.attention]
    num = len(triangles)
    return Heads(config.num_heads, config.head_size, num * config.num_heads, config.head_size // num, triangles)


def _layers(config: ModelConfig) -> list[Layers]:
    """Runs of equal layers, in order."""
    runs: list[Layers] = []
    for layer, run in groupby(config.resolved_layers):
        first = runs[-1].last + 1 if runs else 1
        span = "global" if layer.window is None else f"window of {layer.window:,}"
        positions = "none" if layer.rotary_theta is None else f"rotary, theta {layer.rotary_theta:,.0f}"
        if config.positions == "learned":
            positions = f"learned, up to {config.max_positions:,}"
        runs.append(Layers(first, first + len(list(run)) - 1, span, positions))
    return runs
