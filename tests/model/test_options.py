"""What the config can ask of the encoder beyond its plain form."""

import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.testing import CompileCounter

from pretrain.batch import IGNORED, Batch
from pretrain.config.model import LayerConfig, ModelConfig
from pretrain.model.encoder import Encoder, MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.model.rotary import RotaryScaling
from pretrain.training.step import dropout_seed
from pretrain.training.zero.construction import compile_blocks

LOCAL_GLOBAL = [{"span": 3}, {"span": "global", "positions": "none"}]


def small(**changes: object) -> ModelConfig:
    return ModelConfig(**{"hidden_size": 32, "num_layers": 4, "num_heads": 2, **changes})


def batch_of(rows: int, length: int, documents: int = 1, padding: int = 0) -> Batch:
    ids = torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(length))
    each = -(-length // documents)
    numbers, positions = (
        (torch.arange(length) // each + 1).repeat(rows, 1),
        (torch.arange(length) % each).repeat(rows, 1),
    )
    if padding:
        numbers[:, -padding:], positions[:, -padding:] = 0, 0
    return Batch(ids, torch.where(numbers > 0, ids, IGNORED), numbers, positions)


def losses(model: MaskedLanguageModel, batch: Batch) -> torch.Tensor:
    return model(batch, AttentionLayout.from_batch(batch))[0]


def build(config: ModelConfig, like: MaskedLanguageModel | None = None) -> MaskedLanguageModel:
    torch.manual_seed(0)
    model = MaskedLanguageModel(config, 50)
    if like is not None:
        model.load_state_dict(like.state_dict(), strict=False)
    return model


def test_layers_repeat_the_pattern_and_fill_in_the_defaults_of_the_model():
    config = small(num_layers=5, layers=[{"span": 64, "rotary_theta": 500}, {"span": 16}, *LOCAL_GLOBAL[1:]])
    local, other = (LayerConfig(span=s, positions="rotary", rotary_theta=t) for s, t in ((64, 500), (16, 10_000)))
    everywhere = LayerConfig(span="global", positions="none")
    assert config.resolved_layers == [local, other, everywhere, local, other]
    assert [small().layer(i) for i in (0, 3)] == [LayerConfig(positions="rotary", rotary_theta=10_000)] * 2
    assert small(positions="learned").layer(0).positions == "none"


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"layers": [{"span": 0}]}, "greater than or equal to 1"),
        ({"layers": [{"positions": "none", "rotary_theta": 5}]}, "no use for rotary_theta"),
        ({"positions": "learned", "layers": [{"positions": "rotary"}]}, "do not go with positions = learned"),
        ({"positions": "none", "layers": [{"rotary_theta": 5}]}, "needs its positions = rotary"),
        ({"positions": "none", "drop_positions_after": 5}, "needs rotary positions to drop"),
        ({"head_dim": 9}, "cannot be split"),
        ({"head_dim": 6}, "sub-head is 3 wide"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_impossible_models_are_refused(changes, answer):
    with pytest.raises(ValidationError, match=answer):
        small(**changes)


@pytest.mark.parametrize("positions", ["rotary", "none", "learned"])
@pytest.mark.parametrize("attention", ["dual_triangle", "bidirectional", "causal"])
def test_a_packed_row_gives_the_losses_of_its_documents_alone(positions, attention):
    layers = LOCAL_GLOBAL if positions == "rotary" else []
    model = build(small(positions=positions, attention=attention, layers=layers, qk_norm=True, unet=True)).double()
    packed = batch_of(1, 20, documents=2)
    alone = [
        Batch(
            *(
                x[:, piece]
                for x in (packed.input_ids, packed.labels, torch.ones_like(packed.labels), packed.position_ids)
            )
        )
        for piece in (slice(0, 10), slice(10, 20))
    ]
    torch.testing.assert_close(losses(model, packed), torch.cat([losses(model, b) for b in alone]), rtol=0, atol=1e-5)


def test_windowed_layers_see_no_further_than_their_windows_add_up_to():
    encoder = Encoder(small(layers=[{"span": 3}]), 50).double()
    batch = batch_of(1, 30)
    x = encoder.embedding(batch.input_ids).detach().requires_grad_()
    encoder.embedding.forward = lambda ids: x
    encoder(batch.input_ids, AttentionLayout.from_batch(batch))[0, 15].sum().backward()
    seen = x.grad[0].abs().sum(dim=1).nonzero().flatten().tolist()
    assert seen == list(range(15 - 4 * 2, 15 + 4 * 2 + 1))


def test_head_dim_and_glu_shape_the_parameters_as_the_config_says():
    model = build(small(head_dim=24, glu="geglu"))
    assert model.encoder.blocks[0].attention.qkv.weight.shape == (3 * 48, 32)
    plain = build(small())
    assert not torch.equal(losses(build(small(glu="geglu"), like=plain), batch_of(1, 9)), losses(plain, batch_of(1, 9)))


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys():
    model, batch = build(small(qk_norm=True)).double(), batch_of(2, 9)
    before = losses(model, batch)
    for block in model.encoder.blocks:
        block.attention.qkv.weight.data[: 2 * 32] *= 10
    torch.testing.assert_close(losses(model, batch), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_layers", [3, 4])
def test_the_unet_form_begins_as_the_plain_encoder_and_learns_its_skips(num_layers):
    plain, batch = build(small(num_layers=num_layers)), batch_of(2, 9)
    unet = build(small(num_layers=num_layers, unet=True), like=plain)
    assert torch.equal(losses(unet, batch), losses(plain, batch))
    losses(unet, batch).sum().backward()
    mixes = [block.mix for block in unet.encoder.blocks]
    assert [len(mix) for mix in mixes] == ([2, 2, 3] if num_layers == 3 else [2, 2, 3, 3])
    assert all(mix.grad.all() for mix in mixes)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointing_changes_no_gradient_dropout_included(every):
    model, batch = build(small(dropout=0.2, layers=LOCAL_GLOBAL, unet=True)), batch_of(2, 12, documents=2)
    gradients = []
    for checkpoint_every in (0, every):
        model.encoder.checkpoint_every = checkpoint_every
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(losses(model, batch).sum(), list(model.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_dropout_is_off_in_evaluation_and_a_function_of_seed_step_rank_and_micro_batch():
    model, batch = build(small(dropout=0.3)), batch_of(2, 9)

    def at(*key: int) -> torch.Tensor:
        torch.manual_seed(dropout_seed(*key))
        return losses(model, batch)

    assert torch.equal(at(1, 2, 0, 0), at(1, 2, 0, 0))
    others = [at(*key) for key in ((2, 2, 0, 0), (1, 3, 0, 0), (1, 2, 1, 0), (1, 2, 0, 1))]
    assert not any(torch.equal(at(1, 2, 0, 0), other) for other in others)
    plain = build(small(), like=model)
    assert torch.equal(losses(model.eval(), batch), losses(plain, batch))


def test_z_loss_is_in_the_gradient_and_not_in_the_reported_loss():
    plain, batch = build(small()), batch_of(2, 9)
    penalised = build(small(z_loss=0.1), like=plain)
    assert torch.equal(losses(penalised, batch), losses(plain, batch))
    hidden = penalised.encoder(batch.input_ids, AttentionLayout.from_batch(batch)).flatten(0, 1)
    logits = penalised.head(hidden)
    total = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum")
    total = total + 0.1 * logits.logsumexp(dim=-1).square().sum()
    weights = list(penalised.parameters())
    ours = torch.autograd.grad(losses(penalised, batch).sum(), weights)
    for one, other in zip(ours, torch.autograd.grad(total, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_positions_are_dropped_by_tokens_seen_alone():
    model, batch = build(small(drop_positions_after=100)), batch_of(2, 9)
    plain = build(small(), like=model)
    bare = build(small(positions="none"), like=model)
    for tokens, expected in ((0, plain), (100, bare), (99, plain), (5_000, bare)):
        model.encoder.set_tokens_seen(tokens)
        assert torch.equal(losses(model, batch), losses(expected, batch))


def test_scalings_and_theta_are_set_on_the_encoder_and_reach_the_layers_that_see_far():
    batch = batch_of(1, 24)
    for layers, reaches in (
        ([], True),
        ([{"span": 8}], False),
        ([{"span": 12}], False),  # as far as rows were trained on
        ([{"span": 13}], True),
        ([{"span": 8}, {}], True),
    ):
        model = build(small(layers=layers))
        before = losses(model, batch)
        model.encoder.rotary_scaling = RotaryScaling("yarn", 1.0, 12)
        assert torch.equal(losses(model, batch), before)
        model.encoder.rotary_scaling = RotaryScaling("yarn", 2.0, 12)
        assert torch.equal(losses(model, batch), before) != reaches
        model.encoder.rotary_scaling, model.encoder.rotary_theta = None, 500.0
        assert torch.equal(
            losses(model, batch), losses(build(small(layers=layers, rotary_theta=500), like=model), batch)
        )


@pytest.fixture
def traced():
    """Stand-in for a compiler, which counts what it is given to compile and runs it as it is."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def compiled_losses(traced, shapes: list[tuple[int, int, int, int]]) -> list[int]:
    """Compare compiled and plain blocks on batches of these shapes; how often was compiled after each?"""
    config, counts = small(num_layers=2, num_heads=4, layers=LOCAL_GLOBAL), []
    plain, compiled = build(config), build(config)
    compile_blocks(compiled.encoder, traced)
    for shape in shapes:
        batch = batch_of(*shape)
        ours, reference = losses(compiled, batch), losses(plain, batch)
        ours.sum().backward()
        torch.testing.assert_close(ours, reference)
        counts.append(traced.frame_count)
    return counts


def test_compiled_blocks_equal_plain_ones(traced):
    # Before attention with and without rotary positions, and after it.
    assert compiled_losses(traced, [(2, 32, 1, 0), (2, 32, 1, 0)]) == [3, 3]


@pytest.mark.slow
def test_compiled_blocks_do_not_compile_again_for_another_length(traced):
    shapes = [
        (2, 32, 1, 0), (3, 40, 1, 0), (5, 48, 1, 3), (3, 70, 1, 0), (6, 71, 1, 1),
        (5, 72, 2, 0), (3, 50, 2, 2), (6, 64, 4, 0), (7, 33, 1, 0), (5, 90, 3, 1),
    ]  # fmt: skip
    # Once for the first shape, once for all others. Padded rows are one more on the CPU, where short full rows come
    # back from attention as a view and others do not; packed rows, which bring positions of their own, another.
    assert compiled_losses(traced, shapes) == [3, 6, 7, 7, 7, 8, 8, 8, 8, 8]
