"""The optimizer over a model's parameters, in groups by weight decay and by how learning rates scale with width."""

from typing import Any

import torch
from torch import nn

from pretrain.config import OptimizerConfig
from pretrain.model.encoder import MaskedLanguageModel


def parameter_groups(model: MaskedLanguageModel, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and embeddings do not (a tied output matrix is the embedding).

    `lr_scale` is what the learning rate of a group is multiplied by. Under `mup` it is 1 / width for the matrices
    between hidden layers (Yang et al., arXiv 2203.03466, table 8, for Adam); their decay is as much stronger, since
    AdamW multiplies it by the learning rate and it must not fade with the width (Wang and Aitchison, arXiv 2405.13698).
    """
    width = model.encoder.config.width_ratio
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        decays = parameter.ndim >= 2 and id(parameter) not in embeddings
        scale = 1 / width if decays and parameter is not model.head.weight else 1.0
        groups.setdefault((not decays, scale), []).append(parameter)
    return [
        {"params": groups[kept, scale], "weight_decay": 0.0 if kept else weight_decay / scale, "lr_scale": scale}
        for kept, scale in sorted(groups)
    ]


def build_optimizer(model: MaskedLanguageModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); the trainer sets the learning rate before every step."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
