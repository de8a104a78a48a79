"""The encoder's properties that follow from its attention and positions."""

import pytest
import torch

from pretrain.batch import IGNORED, Batch
from pretrain.config.model import ModelConfig
from pretrain.model.encoder import Encoder, MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.model.rotary import rotary_frequencies, rotary_table, rotate


def full_batch(ids: torch.Tensor) -> Batch:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, torch.full_like(ids, IGNORED), torch.ones_like(ids), positions)


def encode(encoder: Encoder, ids: torch.Tensor) -> torch.Tensor:
    return encoder(ids, AttentionLayout.from_batch(full_batch(ids)))


def small(**changes: object) -> ModelConfig:
    return ModelConfig(hidden_size=32, num_layers=2, num_heads=2, **changes)


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_without_positions_only_the_triangles_know_the_order_of_tokens():
    ids, order = torch.randperm(50)[None, :9], torch.randperm(9)
    for attention, follows_permutation in (("bidirectional", True), ("dual_triangle", False), ("causal", False)):
        encoder = Encoder(small(attention=attention, positions="none"), 50)
        difference = (encode(encoder, ids[:, order]) - encode(encoder, ids)[:, order]).abs().max()
        assert (difference < 1e-12) == follows_permutation


def test_reversing_the_input_and_swapping_the_triangles_reverses_the_output():
    config = small(positions="none")
    encoder, swapped = Encoder(config, 50), Encoder(config, 50)
    swapped.load_state_dict(encoder.state_dict())
    half = config.head_size // 2
    for block in swapped.blocks:
        qkv = block.attention.qkv.weight.data.view(3, config.num_heads, 2, half, -1)
        qkv.copy_(qkv.flip(2).clone())
        output = block.attention.output.weight.data.view(-1, config.num_heads, 2, half)
        output.copy_(output.flip(2).clone())
    ids = torch.randint(50, (2, 9))
    torch.testing.assert_close(encode(swapped, ids.flip(1)).flip(1), encode(encoder, ids), rtol=0, atol=1e-12)


def test_rotary_scores_depend_on_distance_only_and_each_sub_head_has_all_frequencies():
    frequencies = rotary_frequencies(8, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, rotary_table(torch.tensor([[position]]), frequencies))

    scores = [(rotated(q, i) * rotated(k, j)).sum() for i, j in ((3, 1), (103, 101))]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5)
    assert frequencies.tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
    with pytest.raises(ValueError, match="pairs"):
        rotary_frequencies(7, 10_000.0)


@pytest.mark.parametrize("attention", ["dual_triangle", "bidirectional", "causal"])
def test_shifting_all_rotary_positions_changes_nothing_in_a_layer(attention):
    config = small(attention=attention)
    block = Encoder(config, 50).blocks[0]
    x, positions = torch.randn(2, 9, 32), torch.arange(9).expand(2, 9)
    layout, frequencies = (
        AttentionLayout.from_batch(full_batch(positions)),
        rotary_frequencies(config.sub_head_size, 100.0),
    )
    here, there, wider = (
        block(x, layout, rotary_table(p, frequencies), "sdpa") for p in (positions, positions + 50, 2 * positions)
    )
    torch.testing.assert_close(there, here, rtol=0, atol=1e-5)
    assert (wider - here).abs().max() > 1e-3


def test_dual_triangle_attention_costs_no_parameter_more():
    counts = {
        kind: sum(p.numel() for p in Encoder(small(attention=kind), 50).parameters())
        for kind in ("dual_triangle", "bidirectional", "causal")
    }
    assert len(set(counts.values())) == 1
    config = small()
    assert counts["causal"] == 50 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * config.ffn_size + 2 * 32) + 32


@pytest.mark.parametrize("positions", ["rotary", "learned", "none"])
def test_padding_on_the_right_changes_no_loss(positions):
    model = MaskedLanguageModel(small(positions=positions), 50)
    ids, labels = torch.randint(50, (1, 9)), torch.full((1, 9), IGNORED)
    labels[0, [2, 5]] = torch.tensor([7, 8])
    bare = Batch(ids, labels, torch.ones_like(ids), torch.arange(9)[None])

    def pad(x: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 4), value=value)

    padded = Batch(pad(ids, 0), pad(labels, IGNORED), pad(bare.document_ids, 0), pad(bare.position_ids, 0))
    losses = [model(batch, AttentionLayout.from_batch(batch))[0] for batch in (bare, padded)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)


def test_logits_are_those_of_the_masked_positions_and_tied_to_the_embedding():
    model = MaskedLanguageModel(small(), 50)
    ids, labels = torch.randint(50, (2, 6)), torch.full((2, 6), IGNORED)
    labels[0, 3], labels[1, 1] = 4, 9
    batch = Batch(ids, labels, torch.ones_like(ids), torch.arange(6).expand(2, 6))
    hidden = encode(model.encoder, ids)
    everywhere = torch.log_softmax(hidden @ model.encoder.embedding.weight.T, dim=-1)
    losses, _ = model(batch, AttentionLayout.from_batch(batch))
    expected = -torch.stack((everywhere[0, 3, 4], everywhere[1, 1, 9]))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)


def test_projections_into_the_residual_stream_begin_smaller_by_the_root_of_their_number():
    config = ModelConfig(hidden_size=64, num_layers=8, num_heads=2)
    model = MaskedLanguageModel(config, 50)
    stds = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert len(stds) == 1 + 4 * 8
    for name, std in stds.items():
        is_into_residual = name.endswith(("output.weight", "down.weight"))
        expected = config.embedding_std if "embedding" in name else config.initial_std / (4 if is_into_residual else 1)
        assert std == pytest.approx(expected, rel=0.06), name


@pytest.mark.parametrize("autocast", [False, True])
def test_the_kernel_is_chosen_for_the_type_that_attention_computes_in(monkeypatch, autocast):
    asked = []
    monkeypatch.setattr("pretrain.model.encoder.choose_kernel", lambda _, dtype, *rest: asked.append(dtype) or "sdpa")
    encoder = Encoder(small(), 50).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        encode(encoder, torch.randint(50, (1, 9)))
    assert asked == [torch.bfloat16 if autocast else torch.float32] * 2


def test_rows_longer_than_the_learned_positions_are_refused():
    encoder = Encoder(small(positions="learned", max_positions=8), 50)
    with pytest.raises(ValueError, match="9 positions is beyond the 8"):
        encode(encoder, torch.randint(50, (1, 9)))


def losses_of(model: MaskedLanguageModel) -> torch.Tensor:
    ids = torch.arange(32)[None]
    batch = Batch(ids, ids, torch.ones_like(ids), ids)
    return model(batch, AttentionLayout.from_batch(batch))[0]


@pytest.mark.parametrize("width", [64, 128])
def test_mup_is_the_standard_parametrization_at_its_base_width(width):
    losses = []
    for kind in ("standard", "mup"):
        torch.manual_seed(0)
        losses.append(losses_of(MaskedLanguageModel(ModelConfig(hidden_size=width, parametrization=kind), 50)))
    assert losses[0].equal(losses[1]) == (width == 128)


def test_under_mup_logits_are_divided_by_the_width_and_only_hidden_weights_begin_smaller():
    shape = {"hidden_size": 512, "num_heads": 8, "tie_embeddings": False}
    mup = MaskedLanguageModel(ModelConfig(parametrization="mup", base_width=128, **shape), 50)
    assert float(mup.encoder.embedding.weight.detach().std()) == pytest.approx((2 / (5 * 128)) ** 0.5, rel=0.05)
    hidden = mup.encoder.blocks[0].attention.qkv.weight.detach()
    assert float(hidden.std()) == pytest.approx((2 / (5 * 512)) ** 0.5, rel=0.05)
    standard = MaskedLanguageModel(ModelConfig(**shape), 50)
    standard.load_state_dict(mup.state_dict())
    standard.head.weight.data.div_(512 / 128)
    torch.testing.assert_close(losses_of(mup), losses_of(standard))
