"""The step before the first: it leaves no trace, and running out of memory in it is answered."""

import pytest
import torch

from pretrain.config.load import load_config
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.run.opening import open_run_folder
from pretrain.training import trainer as trainer_module
from pretrain.training.mock_step import largest_batch, mock_step, out_of_memory
from pretrain.training.zero.engine import Engine
from tests.ranks import run_on_ranks
from tests.training.test_training import STAGES, curve, train

HUGE = 2**21
"""Positions whose dense scores no machine has memory for."""


def train_with_and_without(rank, pairs):
    for with_step, without in pairs:
        train(rank, with_step, 2)
        trainer_module.mock_step = lambda *_: None
        train(rank, without, 2)
        trainer_module.mock_step = mock_step


@pytest.mark.slow
def test_a_run_is_bit_for_bit_that_without_the_step_at_every_stage(make_config, manifest, tmp_path):
    pairs = []
    for stage in STAGES:
        for precision in ("fp32", "bf16"):
            training = {"sharding": stage, "precision": precision, "tokens": 4_000}
            pair = [
                make_config(f"{stage}-{precision}-{kind}", training=training, model={"dropout": 0.1})
                for kind in ("with", "without")
            ]
            pairs.append(pair)
            for config in pair:
                open_run_folder(config, load_manifest(config.corpus.path))
    run_on_ranks(train_with_and_without, 2, tmp_path / "ranks", pairs)
    for with_step, without in pairs:
        assert curve(with_step) == curve(without)
        assert len(curve(with_step)) >= 8


def run_out_of_memory(rank, config):
    engine = Engine(MaskedLanguageModel(config.model, 16), config, 1, torch.device("cpu"))
    try:
        mock_step(engine, config, 16)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_running_out_of_memory_is_answered_with_what_to_change(tmp_path, make_config):
    config = make_config(
        model={"hidden_size": 4, "num_heads": 1, "num_layers": 1, "kernel": "dense", "positions": "none"},
        data={"sequence_length": HUGE},
        training={"micro_batch_size": 1, "precision": "fp32"},
    )
    (answer,) = run_on_ranks(run_out_of_memory, 1, tmp_path / "ranks", config)
    assert answer.startswith(f"out of memory before the first step, with 1 rows of {HUGE:,} at once. By plan it needs ")
    assert "shorten rows to data.sequence_length=" in answer


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_the_largest_batch_is_full_and_masks_no_less_than_the_rate(packing):
    overrides = [f"data.packing={packing}", "data.final_mask_rate=0.3", "data.sequence_length=50"]
    config = load_config("model/1m", overrides, beneath={"corpus": {"path": "corpora/none"}})
    batch = largest_batch(config, 3, 20)
    assert batch.num_tokens == batch.input_ids.numel() == 3 * 50
    assert 0.3 * 150 <= batch.num_masked <= 0.3 * 150 + 3
    assert AttentionLayout.from_batch(batch).one_document_per_row == (packing == "padded")
    assert int(batch.input_ids.max()) < 20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_an_allocators_error_is_taken_for_a_lack_of_memory(error, expected):
    assert out_of_memory(error) is expected
