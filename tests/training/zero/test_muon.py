"""Muon: what it does to a matrix, who moves what, and that no sharding changes it."""

import pytest
import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config.identity import falsifying
from pretrain.config.load import load_config
from pretrain.config.model import ModelConfig
from pretrain.config.run import RunConfig
from pretrain.config.training import OptimizerConfig
from pretrain.errors import UserError
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.training.cost.hardware import Hardware
from pretrain.training.cost.plan import MemoryPlan
from pretrain.training.zero.muon import Matrix, Parts, Piece, newton_schulz, orthogonal_update, owners, rounds
from pretrain.training.zero.optimizer import build_optimizer, parameter_groups, summarize_groups

MUON = OptimizerConfig(kind="muon", weight_decay=0.1)


def model_of(**changed) -> MaskedLanguageModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "tie_embeddings": False}
    return MaskedLanguageModel(ModelConfig.model_validate(shape | changed), 50)


def backward(model: MaskedLanguageModel, seed: int) -> None:
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(seed))
    batch = Batch(ids, ids, torch.ones_like(ids), torch.arange(16).expand(2, 16))
    model.zero_grad()
    model(batch, AttentionLayout.from_batch(batch))[0].mean().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions(dtype):
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 24), (64, 16), (3, 16, 64)):
        u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        s = s.clamp(min=0.05 * float(s.max()))  # a tiny one would need more steps
        made = newton_schulz(((u * s[..., None, :]) @ v).to(dtype) * 1e-6, steps=5)
        assert (made.dtype, made.shape) == (dtype, shape)
        inner = u.mT @ made.float() @ v.mT  # diagonal, if the singular vectors are kept
        values = inner.diagonal(dim1=-2, dim2=-1)
        assert float((values - 0.95).abs().max()) < 0.3, values
        assert float((inner - values.diag_embed()).abs().max()) < (1e-4 if dtype == torch.float32 else 0.06)
    assert newton_schulz(torch.zeros(4, 8), steps=5).equal(torch.zeros(4, 8))


def test_every_matrix_of_a_stack_is_made_orthogonal_for_itself_with_the_rms_of_adamw():
    generator, sizes = torch.Generator().manual_seed(1), torch.tensor([1, 1e-2, 1e-4])
    blocks = torch.randn(3, 32, 32, generator=generator) * sizes.view(3, 1, 1)
    stacked = orthogonal_update(blocks.reshape(-1), Matrix("qkv", 96, 32, blocks=3), 5, 0.2).view(3, 32, 32)
    for block, update in zip(blocks, stacked, strict=True):
        torch.testing.assert_close(update, newton_schulz(block, 5) * 0.2 * 32**0.5, rtol=0, atol=1e-3)
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)
    tall = orthogonal_update(torch.randn(128 * 32, generator=generator), Matrix("down", 128, 32), 5, 0.2)
    assert float(tall.square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)


def reference(
    weights: dict[str, Tensor], momenta: dict[str, Tensor], gradients: dict[str, Tensor], rate: float
) -> None:
    """Muon as its authors write it, each matrix by itself, in plain operations."""
    for name, gradient in gradients.items():
        momenta[name] = 0.95 * momenta[name] + 0.05 * gradient
        ahead = 0.95 * momenta[name] + 0.05 * gradient
        blocks = ahead.chunk(3 if "qkv" in name else 2 if "gate_and_up" in name else 1)
        updates = []
        for block in blocks:
            x = block / block.norm()
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x - 4.7750 * (a @ x) + 2.0315 * (a @ (a @ x))
            updates.append(x * 0.2 * max(x.shape) ** 0.5)
        weights[name] = weights[name] * (1 - rate * 0.1) - rate * torch.cat(updates)


def test_steps_equal_those_of_a_plain_reference_and_of_adamw_for_the_rest():
    model, other = model_of(), model_of()
    optimizer = build_optimizer(model, MUON)
    matrices = {name: p for name, p in other.named_parameters() if p.ndim == 2 and ".blocks." in name}
    weights = {name: p.detach().clone() for name, p in matrices.items()}
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    rest = [p for name, p in other.named_parameters() if name not in matrices]
    decays = {True: 0.1, False: 0.0}
    groups = [{"params": [p], "weight_decay": decays[p is other.head.weight]} for p in rest]
    adamw = torch.optim.AdamW(groups, lr=MUON.learning_rate, betas=MUON.betas, eps=MUON.eps, fused=True)
    for step in range(3):
        backward(model, step)
        backward(other, step)
        gradients = {name: p.grad for name, p in matrices.items() if p.grad is not None}
        reference(weights, momenta, gradients, MUON.learning_rate)
        adamw.step()
        optimizer.step()
        for name, parameter in matrices.items():
            parameter.data.copy_(weights[name])
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6, msg=name)
    kept = [set(optimizer.state[p]) for p in (model.encoder.blocks[0].ffn.down.weight, model.head.weight)]
    assert kept == [{"step", "momentum"}, {"step", "exp_avg", "exp_avg_sq"}]


def test_muon_moves_the_matrices_between_hidden_layers_and_nothing_else():
    model = model_of(positions="learned", max_positions=16, unet=True)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, MUON)
    members = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    block = "encoder.blocks.0"
    assert members["matrices"] == {
        f"{block}.{part}.weight" for part in ("attention.qkv", "attention.output", "ffn.gate_and_up", "ffn.down")
    }
    assert members["output matrix"] == {"head.weight"}
    assert sum(map(len, members.values())) == len(names)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    lines = list(map(str, summarize_groups(groups, 3e-3)))
    assert lines[0] == f"matrices by Muon: 4 tensors, {sizes[0]:,} parameters, learning rate 0.003, weight decay 0.1"
    assert lines[1].startswith("output matrix by AdamW: 1 tensors, 1,600 parameters")
    assert lines[2].endswith("weight decay 0")
    assert {matrix.blocks for matrix in groups[0]["matrices"] if "qkv" in matrix.name} == {3}


def test_under_mup_the_rate_of_a_matrix_falls_with_the_root_of_the_width():
    groups = parameter_groups(model_of(hidden_size=128, parametrization="mup", base_width=32), MUON)
    assert [group["lr_scale"] for group in groups] == [0.5, 1.0, 1.0]
    assert [group["lr_scale"] * group["weight_decay"] for group in groups] == pytest.approx([0.1, 0.1, 0.0])


def test_a_matrix_comes_together_where_much_of_it_is_and_work_is_shared_out(monkeypatch):
    matrices = [Matrix(str(n), 8, 8) for n in range(4)]
    quarters = [{m.name: Piece(m.name, rank * 16, 16, 0) for m in matrices} for rank in range(4)]
    assert [owner for _, owner in owners(matrices, quarters)] == [0, 1, 2, 3]
    mostly = [{"0": Piece("0", 0, 10, 0)}, {"0": Piece("0", 10, 54, 0)}]
    assert owners(matrices[:1], mostly) == [(matrices[0], 1)]
    # The rank with half of what the largest holder has may own a matrix, the one with less may not.
    parts = [{m.name: Piece(m.name, 0, length, 0) for m in matrices} for length in (40, 20, 4)]
    assert [owner for _, owner in owners(matrices, parts)] == [0, 1, 0, 1]
    monkeypatch.setattr("pretrain.training.zero.muon.ROUND", 100)
    owned = list(zip(matrices, [0, 1, 0, 1], strict=True))
    assert rounds(owned, 2) == [owned[:2], owned[2:]]
    assert Parts(matrices, quarters, 1).rounds[0].own == [matrices[1]]
    with pytest.raises(AssertionError, match="ranks hold"):
        Parts(matrices[:1], quarters[:3], 0)


def load(*overrides: str) -> RunConfig:
    return load_config("model/1m", list(overrides), beneath={"corpus": {"path": "corpora/none"}})


def test_another_kind_of_optimizer_makes_it_another_run():
    assert falsifying(load(), load("optimizer.kind=muon", "optimizer.learning_rate=1"), 1) == ["optimizer.kind"]


def test_settings_of_muon_without_muon_are_refused():
    with pytest.raises(UserError, match="muon has settings, but kind is adamw; add optimizer.kind=muon"):
        load("optimizer.muon.momentum=0.9")
    with pytest.raises(UserError, match=r"optimizer.muon.momentum: .*less than 1"):
        load("optimizer.kind=muon", "optimizer.muon.momentum=1")
    assert load("optimizer.kind=muon", "optimizer.muon.momentum=0.9").optimizer.muon.steps == 5


def test_a_plan_has_one_moment_of_a_matrix_and_two_of_the_rest():
    hardware = Hardware("cpu", 2**33, 2, False, 2)
    plans = {kind: MemoryPlan(load(f"optimizer.kind={kind}"), 512, hardware) for kind in ("adamw", "muon")}
    saved = 4 * plans["muon"].optimizer.orthogonal
    assert saved > 0.8 * 4 * plans["muon"].parameters
    assert plans["adamw"].optimizer.checkpoint_bytes - plans["muon"].optimizer.checkpoint_bytes == saved
    optimizer = {kind: plan.need(plan.configured).states.optimizer for kind, plan in plans.items()}
    assert optimizer["adamw"] - optimizer["muon"] == saved // 2
