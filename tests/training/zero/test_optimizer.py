"""Who moves which parameter, at what multiple of the learning rate, and what decays."""

import pytest

from pretrain.config.model import ModelConfig
from pretrain.config.training import OptimizerConfig
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.training.zero.optimizer import parameter_groups

SHAPE = {"hidden_size": 128, "num_layers": 1, "num_heads": 2, "tie_embeddings": False}


def groups_of(**model):
    config = ModelConfig.model_validate(SHAPE | model)
    return parameter_groups(MaskedLanguageModel(config, 50), OptimizerConfig(weight_decay=0.1))


def test_under_mup_the_rate_of_adamw_falls_with_the_width_for_hidden_matrices_but_not_for_the_output_matrix():
    groups = groups_of(parametrization="mup", base_width=32)
    assert [group["name"] for group in groups] == ["matrices", "output matrix", "norms and embeddings"]
    assert [group["lr_scale"] for group in groups] == [0.25, 1.0, 1.0]
    assert [group["lr_scale"] * group["weight_decay"] for group in groups] == pytest.approx([0.1, 0.1, 0.0])
    assert [len(group["params"]) for group in groups[:2]] == [4, 1]


def test_without_mup_the_output_matrix_is_one_of_the_matrices():
    groups = groups_of()
    assert [group["name"] for group in groups] == ["matrices", "norms and embeddings"]
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0]
    assert len(groups[0]["params"]) == 5
