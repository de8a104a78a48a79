"""Interventions touch no weight and are taken back; a triangle that is off gives nothing."""

import math

import pytest
import torch

from pretrain.batch import Batch
from pretrain.config.model import LayerConfig, ModelConfig
from pretrain.evaluation.context.interventions import ABLATIONS, INTERVENTIONS, intervene, reason_against
from pretrain.model.encoder import Encoder
from pretrain.model.layout import AttentionLayout

TRAINED = 16


def encoder(**changes) -> Encoder:
    torch.manual_seed(3)
    config = ModelConfig(**{"hidden_size": 32, "num_layers": 2, "num_heads": 2, **changes})
    return Encoder(config, 50).double().eval()


def output(model: Encoder, length: int) -> torch.Tensor:
    ids = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(length))
    ones = torch.ones_like(ids)
    layout = AttentionLayout.from_batch(Batch(ids, ids, ones, torch.arange(length).expand(2, -1)))
    with torch.inference_mode():
        return model(ids, layout).clone()


@pytest.mark.parametrize("intervention", [*INTERVENTIONS, *ABLATIONS])
def test_an_intervention_changes_long_rows_and_is_taken_back(intervention):
    model = encoder()
    before = output(model, 64)
    with intervene(model, intervention, 64, TRAINED, 4.0):
        assert float((output(model, 64) - before).abs().max()) > 1e-6
    assert torch.equal(output(model, 64), before)


@pytest.mark.parametrize("intervention", ["dynamic_ntk", "log_length", "windowed"])
def test_these_leave_rows_of_the_training_length_alone(intervention):
    model = encoder()
    before = output(model, TRAINED)
    with intervene(model, intervention, TRAINED, TRAINED):
        torch.testing.assert_close(output(model, TRAINED), before, rtol=0, atol=1e-12)


def test_log_length_multiplies_every_score_of_layers_that_see_far():
    model = encoder(positions="none", layers=[LayerConfig(span=8), LayerConfig()])
    with intervene(model, "log_length", 64, TRAINED):
        scaled = output(model, 64)
    scale = math.log(64) / math.log(TRAINED)
    with torch.no_grad():
        model.blocks[1].attention.qkv.weight[:32] *= scale
    torch.testing.assert_close(output(model, 64), scaled, rtol=0, atol=1e-10)


def test_log_length_scales_a_layer_by_its_reach_and_none_that_reaches_no_further_than_it_was_trained_to():
    spans = [TRAINED - 1, TRAINED, TRAINED + 1, 32, 64, "global"]
    model = encoder(layers=[LayerConfig(span=span) for span in spans], num_layers=len(spans))
    with intervene(model, "log_length", 48, TRAINED):
        scales = [block.attention.query_scale for block in model.blocks]
    reaches = [TRAINED, TRAINED, TRAINED + 1, 32, 48, 48]
    assert scales == pytest.approx([math.log(reach) / math.log(TRAINED) for reach in reaches])


def test_windowed_limits_layers_that_reach_further_and_leaves_narrower_ones_alone():
    model = encoder(layers=[LayerConfig(span=span) for span in (8, TRAINED, 32, "global")], num_layers=4)
    with intervene(model, "windowed", 64, TRAINED):
        assert [block.attention.window for block in model.blocks] == [8, TRAINED, TRAINED, TRAINED]
    assert [block.attention.window for block in model.blocks] == [8, TRAINED, 32, None]


def test_windowed_is_an_encoder_that_was_built_with_that_window():
    model, built = encoder(), encoder(layers=[LayerConfig(span=TRAINED)])
    built.load_state_dict(model.state_dict())
    with intervene(model, "windowed", 64, TRAINED):
        torch.testing.assert_close(output(model, 64), output(built, 64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("intervention", "kept"), [("without_past", "future"), ("without_future", "past")])
def test_without_a_triangle_nothing_comes_from_its_side(intervention, kept):
    """In a single layer, changing a token on the side that is off changes no state but the residual one of itself."""
    torch.manual_seed(3)
    model = Encoder(ModelConfig(hidden_size=32, num_layers=1, num_heads=2), 50).double().eval()
    ids = torch.randint(50, (1, 20), generator=torch.Generator().manual_seed(0))
    layout = AttentionLayout.from_batch(Batch(ids, ids, torch.ones_like(ids), torch.arange(20)[None]))
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 50
    with torch.inference_mode(), intervene(model, intervention, 20, TRAINED):
        moved = (model(changed, layout) - model(ids, layout)).abs().amax(dim=-1)[0]
    off, on = (moved[11:], moved[:10]) if kept == "future" else (moved[:10], moved[11:])
    assert float(off.max()) == 0
    assert float(on.min()) > 0


def test_interventions_without_a_meaning_say_why():
    local = ModelConfig(layers=[LayerConfig(span=16, positions="rotary"), LayerConfig(positions="none")])
    assert "limited to a window" in reason_against("yarn", local, 16)
    assert reason_against("log_length", local, 16) is None
    assert reason_against("dropped", local, 16) is None
    assert "no layer has rotary" in reason_against("ntk", ModelConfig(positions="none"), 16)
    assert "no two triangles" in reason_against("without_past", ModelConfig(attention="causal"), 16)
    narrow = ModelConfig(layers=[LayerConfig(span=8)])
    assert "no layer sees further" in reason_against("windowed", narrow, 16)
