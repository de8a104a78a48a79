"""FLOPs of an encoder, beside what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.batch import Batch
from pretrain.config.model import ModelConfig
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.kernels import allowed_pairs
from pretrain.model.layout import AttentionLayout
from pretrain.training.cost.flops import flops_per_token, peak_flops


@pytest.mark.parametrize("kind", ["dual_triangle", "causal", "bidirectional"])
@pytest.mark.parametrize("layers", [[], [{"span": 7}, {"positions": "none"}]], ids=["global", "windows"])
def test_flops_with_attention_as_full_equal_torchs_count_on_the_dense_kernel(kind, layers):
    shape = {"hidden_size": 64, "num_layers": 3, "num_heads": 2, "head_dim": 16, "glu": "geglu"}
    config = ModelConfig.model_validate({**shape, "attention": kind, "kernel": "dense", "layers": layers})
    model, length, rows = MaskedLanguageModel(config, 96), 32, 2
    ids = torch.randint(96, (rows, length))
    batch = Batch(ids, ids, torch.ones_like(ids), torch.arange(length).expand(rows, length))
    with FlopCounterMode(display=False) as counter:
        model(batch, AttentionLayout.from_batch(batch))[0].sum().backward()
    assert counter.get_total_flops() == rows * length * flops_per_token(config, 96, length).total_as_full(1.0)


def test_triangles_hold_half_the_pairs_and_the_diagonal_twice():
    dual, full = (flops_per_token(ModelConfig(attention=kind), 96, 100) for kind in ("dual_triangle", "bidirectional"))
    assert dual.attention == full.attention * 101 / 200
    assert dual.attention_as_full == full.attention_as_full == full.attention


@pytest.mark.parametrize("kind", ["dual_triangle", "causal", "bidirectional"])
def test_windows_heads_and_glu_are_counted_as_they_are(kind):
    layers = [{"span": 7}, {"span": 200}, {"span": "global", "positions": "none"}]
    config = ModelConfig(attention=kind, layers=layers, num_layers=3, head_dim=32, glu="geglu")
    flops, layout = flops_per_token(config, 96, 100), one_document(100)
    pairs = sum(float(allowed_pairs(layout, kind, window)[0].sum()) for window in (7, None, None))
    assert flops.attention == pytest.approx(3 * 4 * 64 * pairs / 100)
    assert flops.attention_as_full == 3 * 4 * 64 * 3 * 100
    assert flops.matrices == 6 * 3 * (4 * 128 * 64 + 3 * 128 * config.ffn_size)


def one_document(length: int) -> AttentionLayout:
    ids = torch.ones(1, length, dtype=torch.int64)
    return AttentionLayout.from_batch(Batch(ids, ids, ids, torch.arange(length)[None]))


def test_peaks_are_known_for_gpus_only():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None
