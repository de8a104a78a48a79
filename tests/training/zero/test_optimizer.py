"""Who moves which parameter, at what multiple of the learning rate, and what decays."""

import pytest

from pretrain.config.model import ModelConfig
from pretrain.config.training import OptimizerConfig
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.training.zero.optimizer import parameter_groups


def groups_of(config: ModelConfig) -> dict[str, tuple[float, float, set[str]]]:
    """Scale of the learning rate, weight decay and members of each group under AdamW, by its name."""
    model = MaskedLanguageModel(config, 50)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    return {g["name"]: (g["lr_scale"], g["weight_decay"], {names[id(p)] for p in g["params"]}) for g in groups}


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_spares_norms_and_embeddings(tied):
    groups = groups_of(ModelConfig(tie_embeddings=tied, positions="learned", max_positions=16))
    assert {name: group[:2] for name, group in groups.items()} == {
        "matrices": (1.0, 0.1),
        "norms and embeddings": (1.0, 0.0),
    }
    decayed, kept = (members for *_, members in groups.values())
    assert {n for n in kept if "norm" not in n} == {"encoder.embedding.weight", "encoder.position_embedding.weight"}
    assert ("head.weight" in decayed) == (not tied)


def test_under_mup_hidden_matrices_have_learning_rate_over_width_and_the_decay_of_their_base():
    config = ModelConfig(hidden_size=512, num_heads=8, parametrization="mup", base_width=128, tie_embeddings=False)
    groups = groups_of(config)
    assert {name: group[:2] for name, group in groups.items()} == {
        "matrices": (0.25, 0.4),
        "output matrix": (1.0, 0.1),
        "norms and embeddings": (1.0, 0.0),
    }
    assert groups["output matrix"][2] == {"head.weight"}
    assert "encoder.embedding.weight" in groups["norms and embeddings"][2]
    assert all(".blocks." in name for name in groups["matrices"][2])
