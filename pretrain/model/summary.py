"""Summary of an encoder: parameters by group, heads, layers, counted from the real module on the meta device.

Nothing is allocated, so a model of any size is summarized in an instant. FLOPs are not counted here.
"""

from dataclasses import dataclass, replace

import torch

from pretrain.config.model import LayerConfig, ModelConfig
from pretrain.model.encoder import MaskedLanguageModel

GROUPS = ("embedding", "attention", "feed-forward", "norms", "head", "other")
"""Groups in the order of a forward pass; `other` is what is none of these, and is left out where it is empty."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one kind of component."""

    name: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Heads:
    """Division of the hidden width by attention."""

    logical: int
    width: int
    """Width of a logical head."""
    sub_heads: int
    """Number of softmaxes: two per logical head under dual-triangle attention, else the head itself."""
    sub_head_width: int
    triangles: tuple[tuple[str, str], ...]
    """Name and reach of each sub-head of a logical head, in the order of its dimensions."""


@dataclass(frozen=True)
class Layers:
    """Consecutive layers that are alike."""

    first: int
    """Number of the first layer, from 1."""
    last: int
    """Number of the last layer, which is one of them."""
    span: str
    positions: str


@dataclass(frozen=True)
class ModelSummary:
    """What `diptych model show` tells of the module."""

    vocab_size: int
    groups: list[ParameterGroup]
    tied: bool
    """Whether the head is the embedding matrix, which is counted once, there."""
    heads: Heads
    layers: list[Layers]

    @property
    def parameters(self) -> int:
        """Parameters of all groups."""
        return sum(group.parameters for group in self.groups)


def summarize(config: ModelConfig, vocab_size: int) -> ModelSummary:
    """Build the module without its weights and count what is in it."""
    with torch.device("meta"):
        model = MaskedLanguageModel(config, vocab_size)
    sizes: dict[str, list[int]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        sizes[group_of(name)].append(parameter.numel())
    return ModelSummary(
        vocab_size=vocab_size,
        groups=[ParameterGroup(n, len(s), sum(s)) for n, s in sizes.items() if s or n != "other"],
        tied=config.tie_embeddings,
        heads=_heads(config),
        layers=_layers(config),
    )


def group_of(parameter: str) -> str:
    """Return the group of a parameter, by its dotted name."""
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
    return Heads(config.num_heads, config.head_size, num * config.num_heads, config.sub_head_size, triangles)


def _layers(config: ModelConfig) -> list[Layers]:
    runs: list[Layers] = []
    for number, layer in enumerate(config.resolved_layers, start=1):
        span, positions = _span(config, layer), _positions(config, layer)
        if runs and (runs[-1].span, runs[-1].positions) == (span, positions):
            runs[-1] = replace(runs[-1], last=number)
        else:
            runs.append(Layers(number, number, span, positions))
    return runs


def _span(config: ModelConfig, layer: LayerConfig) -> str:
    if layer.window is None:
        return "global"
    return f"{layer.window:,} positions" + (" either side" if config.attention == "bidirectional" else "")


def _positions(config: ModelConfig, layer: LayerConfig) -> str:
    if config.positions == "learned":
        return f"learned, up to {config.max_positions:,}"
    if layer.positions == "none":
        return "none"
    dropped = config.drop_positions_after
    return f"rotary, theta {layer.rotary_theta:,.0f}" + (f", dropped after {dropped:,} tokens" if dropped else "")
