"""The optimizer over a model's parameters, in groups by who moves them, weight decay, and how learning rates scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.config.training import OptimizerConfig
from pretrain.model.encoder import GatedFeedForward, MaskedLanguageModel, SelfAttention
from pretrain.training.zero.muon import Matrix, Muon, Piece
from pretrain.training.zero.partition import StatePartition, whole_shape

MATRICES, OUTPUT, REST = "matrices", "output matrix", "norms and embeddings"
"""The groups, in order. The output matrix is among the matrices where nothing sets it apart from them."""
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",)}
"""What each optimizer keeps for every element that it moves."""


def _rows_and_columns(matrix: nn.Parameter) -> tuple[int, int]:
    rows, columns = whole_shape(matrix)
    return rows, columns


def parameter_groups(model: MaskedLanguageModel, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Every parameter in one group, as torch's optimizers take them.

    Matrices decay; norms and embeddings do not (a tied output matrix is the embedding). Muon moves the matrices between
    hidden layers, AdamW all others.

    `lr_scale` is what the learning rate of a group is multiplied by. Under `mup` it is 1 / width for the matrices
    between hidden layers (Yang et al., arXiv 2203.03466, table 8, for Adam). Under Muon it is 1 / sqrt(width): with the
    root mean square of an update the same for all shapes, its spectral norm grows with sqrt(width), and should not
    (Yang et al., arXiv 2310.17813, condition 1). Decay is as much stronger, since it is multiplied by the learning rate
    and must not fade with the width (Wang and Aitchison, arXiv 2405.13698).

    `moments` are the names of what the optimizer keeps for each element.
    """
    width, muon = model.encoder.config.width_ratio, config.kind == "muon"
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    members: dict[str, list[tuple[str, nn.Parameter]]] = {MATRICES: [], OUTPUT: [], REST: []}
    for name, parameter in model.named_parameters():
        if len(whole_shape(parameter)) < 2 or id(parameter) in embeddings:
            members[REST].append((name, parameter))
        elif parameter is model.head.weight and (muon or width != 1):
            members[OUTPUT].append((name, parameter))
        else:
            members[MATRICES].append((name, parameter))
    groups = []
    for kind, named in members.items():
        by_muon = muon and kind == MATRICES
        scale = width ** (-0.5 if by_muon else -1.0) if kind == MATRICES else 1.0
        group: dict[str, Any] = {"name": kind, "params": [p for _, p in named], "lr_scale": scale}
        group["weight_decay"] = 0.0 if kind == REST else config.weight_decay / scale
        group["moments"] = MOMENTS["muon" if by_muon else "adamw"]
        if by_muon:
            blocks = _blocks(model)
            group["matrices"] = [Matrix(name, *_rows_and_columns(p), blocks.get(id(p), 1)) for name, p in named]
        if named:
            groups.append(group)
    grouped = sorted(id(parameter) for group in groups for parameter in group["params"])
    assert grouped == sorted(map(id, model.parameters())), "a parameter is in no group, or in two"
    return groups


def _blocks(model: nn.Module) -> dict[int, int]:
    """How many matrices are on top of each other in one parameter, by its id, where it is more than one."""
    found = {}
    for module in model.modules():
        if isinstance(module, SelfAttention):
            found[id(module.qkv.weight)] = 3
        elif isinstance(module, GatedFeedForward):
            found[id(module.gate_and_up.weight)] = 2
    return found


def build_optimizer(
    model: MaskedLanguageModel, config: OptimizerConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), fused, or Muon with it for what are no matrices.

    The trainer sets the learning rate before every step. `dtype` is what Muon makes matrices orthogonal in.
    """
    groups = parameter_groups(model, config)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    shared = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    return Muon(groups, shared | config.muon.model_dump(), dtype)


def give_pieces(muon: Muon, partition: StatePartition) -> None:
    """Tell Muon where in ZeRO's flat tensors its matrices lie, on all ranks; collective."""
    flat = [tensor for _, tensor in partition.flat_parameters()]
    own: list[list[Piece]] = [[] for _ in flat]
    for fragment, number, offset in partition.placed_weights():
        own[number].append(Piece(fragment.parameter, fragment.start, fragment.tensor.numel(), offset))
    pieces = [own] * partition.world_size
    if partition.world_size > 1:
        dist.all_gather_object(pieces, own)
    muon.take_pieces(flat, pieces, partition.rank)


@dataclass(frozen=True)
class GroupSummary:
    """What a group of the optimizer is, for people."""

    name: str
    optimizer: str
    tensors: int
    parameters: int
    learning_rate: float
    """Learning rate at its peak."""
    weight_decay: float

    def __str__(self) -> str:
        return (
            f"{self.name} by {self.optimizer}: {self.tensors:,} tensors, {self.parameters:,} parameters, learning rate "
            f"{self.learning_rate:g}, weight decay {self.weight_decay:g}"
        )


def summarize_groups(groups: Sequence[dict[str, Any]], learning_rate: float) -> list[GroupSummary]:
    """Return what groups are that ZeRO has not taken yet; `learning_rate` is the config's."""
    return [
        GroupSummary(
            name=group["name"],
            optimizer="Muon" if group.get("matrices") else "AdamW",
            tensors=len(group["params"]),
            parameters=sum(math.prod(whole_shape(parameter)) for parameter in group["params"]),
            learning_rate=learning_rate * group["lr_scale"],
            weight_decay=group["weight_decay"],
        )
        for group in groups
    ]
