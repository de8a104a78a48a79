"""What an encoder is made of, counted from the module."""

import pytest
import torch

from pretrain.config.model import ModelConfig
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.summary import summarize


def numbers(**changes: object) -> dict[str, int]:
    config = ModelConfig.model_validate({"hidden_size": 64, "num_layers": 3, "num_heads": 4, **changes})
    return {group.name: group.parameters for group in summarize(config, 100).groups}


def test_parameters_are_those_of_the_matrices_by_group():
    assert numbers(intermediate_size=96) == {
        "embedding": 100 * 64,
        "attention": 3 * (3 * 64 * 64 + 64 * 64),
        "feed-forward": 3 * 3 * 64 * 96,
        "norms": (2 * 3 + 1) * 64,
        "head": 0,
    }


def test_a_head_of_its_own_and_learned_positions_are_counted():
    assert numbers(tie_embeddings=False)["head"] == 64 * 100
    assert numbers(positions="learned", max_positions=50)["embedding"] == (100 + 50) * 64


@pytest.mark.parametrize("tied", [True, False])
def test_the_groups_add_up_to_the_real_module(tied):
    config = ModelConfig(tie_embeddings=tied, positions="learned", max_positions=32)
    summary = summarize(config, 96)
    assert summary.parameters == sum(p.numel() for p in MaskedLanguageModel(config, 96).parameters())
    assert summary.tied == tied


def test_the_three_kinds_of_attention_have_the_same_parameters():
    assert numbers(attention="dual_triangle") == numbers(attention="bidirectional") == numbers(attention="causal")


def test_sub_heads_are_twice_the_heads_at_half_their_width():
    dual = summarize(ModelConfig(hidden_size=128, num_heads=2), 50).heads
    assert (dual.logical, dual.width, dual.sub_heads, dual.sub_head_width) == (2, 64, 4, 32)
    assert dual.triangles == (("lower", "past and self"), ("upper", "self and future"))
    whole = summarize(ModelConfig(hidden_size=128, num_heads=2, attention="bidirectional"), 50).heads
    assert (whole.logical, whole.width, whole.sub_heads, whole.sub_head_width) == (2, 64, 2, 64)


def test_no_weight_is_allocated(monkeypatch):
    """A hundred billion parameters would not fit."""
    built = []
    build = MaskedLanguageModel.__init__

    def record(self, *arguments):
        build(self, *arguments)
        built.extend(p.device for p in self.parameters())

    monkeypatch.setattr(MaskedLanguageModel, "__init__", record)
    summary = summarize(ModelConfig(hidden_size=32_768, num_layers=8, num_heads=256), 200_000)
    assert summary.parameters > 100_000_000_000
    assert set(built) == {torch.device("meta")}


def test_layers_say_their_span_and_positions():
    (layers,) = summarize(ModelConfig(num_layers=5, rotary_theta=50_000), 50).layers
    assert (layers.first, layers.last, layers.span, layers.positions) == (1, 5, "global", "rotary, theta 50,000")
    assert summarize(ModelConfig(positions="none"), 50).layers[0].positions == "none"


def test_a_pattern_of_layers_is_told_in_runs_of_equal_layers():
    local = {"span": 128, "rotary_theta": 1_000}
    pattern = {"layers": [local, local, {"positions": "none"}], "drop_positions_after": 5_000}
    layers = summarize(ModelConfig.model_validate({"num_layers": 5, **pattern}), 50).layers
    rotary = "rotary, theta 1,000, dropped after 5,000 tokens"
    assert [(run.first, run.last, run.span, run.positions) for run in layers] == [
        (1, 2, "128 positions", rotary),
        (3, 3, "global", "none"),
        (4, 5, "128 positions", rotary),
    ]


def test_norms_of_queries_and_keys_are_norms_and_skip_weights_are_apart():
    plain, more = numbers(), numbers(qk_norm=True, unet=True)
    assert more["norms"] - plain["norms"] == 3 * 2 * 8
    assert more["other"] == 2 + 2 + 3
    assert numbers(head_dim=32)["attention"] == 3 * 4 * 64 * 128
