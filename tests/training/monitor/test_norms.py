"""Norms of gradients and updates by group of parameters, beside what they are by their definition."""

import math

import pytest
import torch
import torch.distributed as dist

from pretrain.config.load import validate
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.summary import group_of
from pretrain.training.mock_step import largest_batch
from pretrain.training.monitor.norms import SAMPLE, Inspection, sample, summarize_squares
from pretrain.training.step import train_step
from pretrain.training.step_record import StepTotals
from pretrain.training.zero.engine import Engine
from tests.ranks import run_on_ranks

VOCAB = 60
STAGES = ("none", "optimizer", "gradients", "full")


def config_of(sharding):
    model = {"hidden_size": 40, "num_heads": 2, "num_layers": 2, "tie_embeddings": False}
    training = {"sharding": sharding, "precision": "fp32", "batch_size": 8, "micro_batch_size": 2}
    values = {"name": "x", "corpus": {"path": "none"}, "data": {"sequence_length": 16}, "model": model}
    return validate({**values, "training": training, "optimizer": {"clip_grad_norm": 0.1}}, "test")


def weights(engine) -> dict[str, torch.Tensor]:
    """Whole, on every rank."""
    found = {name: torch.zeros(math.prod(shape)) for name, shape in engine.parameter_shapes.items()}
    for piece in engine.partition.fragments():
        if piece.kind == "weight":
            found[piece.parameter][piece.start : piece.stop] = piece.tensor
    if engine.config.training.sharding != "none":
        for tensor in found.values():
            dist.all_reduce(tensor)
    return found


def norms_by_group(tensors) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, tensor in tensors.items():
        squares[group_of(name)] = squares.get(group_of(name), 0.0) + float(tensor.double().square().sum())
    return {group: math.sqrt(square) for group, square in squares.items()}


def inspect(rank):
    """Of each stage: what is told after a step, the engine's norm, and the ratios from whole weights."""
    results = {}
    for sharding in STAGES:
        config = config_of(sharding)
        torch.manual_seed(3)
        engine = Engine(MaskedLanguageModel(config.model, VOCAB), config, 2, torch.device("cpu"))
        engine.set_learning_rate(1e-2)
        batch = largest_batch(config, 4, VOCAB)
        batch.input_ids[:, rank::3] = 5 + rank  # other rows on each rank
        totals = StepTotals(2 * batch.num_masked, 2 * batch.num_tokens, 0, 0, stop=False)
        before = weights(engine)
        inspection = Inspection(engine)
        train_step(engine, batch, totals, inspection=inspection)
        after = weights(engine)
        dist.all_reduce(inspection.squares)
        moved = norms_by_group({name: after[name] - before[name] for name in before})
        ratios = {group: moved[group] / norm for group, norm in norms_by_group(before).items()}
        results[sharding] = summarize_squares(inspection.squares.tolist()), engine.grad_norm, ratios
    return results


def test_a_large_parameter_is_sampled_over_all_of_its_rows_and_columns():
    small = torch.arange(SAMPLE)
    assert sample(small).equal(small)
    matrix = torch.arange(4096 * 512)
    chosen = sample(matrix)
    assert SAMPLE / 2 < len(chosen) <= SAMPLE
    assert len((chosen % 512).unique()) == 512
    assert len((chosen // 512).unique()) == 4096


@pytest.mark.slow
def test_norms_combine_to_the_global_norm_and_ratios_are_those_of_whole_weights_at_every_stage(tmp_path):
    results = run_on_ranks(inspect, 2, tmp_path / "ranks")
    assert results[0] == results[1]
    reference = results[0]["none"][0]
    for sharding, (told, grad_norm, ratios) in results[0].items():
        norms = told["grad_norms"]
        assert set(norms) == {"embedding", "attention", "feed-forward", "norms", "head"}
        assert math.hypot(*norms.values()) == pytest.approx(grad_norm, rel=1e-5), sharding
        assert norms == pytest.approx(reference["grad_norms"], rel=1e-4), sharding
        assert told["update_ratios"] == pytest.approx(ratios, rel=1e-4), sharding
        assert min(ratios.values()) > 1e-3
