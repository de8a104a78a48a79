"""Rows spread over ranks: losses, gradients and whole runs are those of rows on one rank."""

from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batch import IGNORED, Batch
from pretrain.checkpoint.folder import list_checkpoints, load_state
from pretrain.config.model import ModelConfig
from pretrain.config.parallel import SOLE_READER, DataRank, ParallelConfig
from pretrain.data.stream.loader import training_steps
from pretrain.data.stream.state import StreamState
from pretrain.errors import UserError
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.model.sequence_parallel import SequenceGroup
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from pretrain.training.collectives import agree_on_step
from tests.integration.test_whole_runs import diptych
from tests.model.rows import layout_of
from tests.ranks import run_on_ranks
from tests.training.test_training import curve, train

VOCAB = 96
LAYERS = [{"span": 24}, {}, {"span": 5, "positions": "none"}, {"rotary_theta": 500.0}]
"""Windowed and global, with and without positions."""
ROWS = {
    "padded": ([[320], [100]], 320),
    "packed": ([[100, 125, 95], [250, 50]], 320),
    "short and packed": ([[20, 30], [64]], 64),
}


def test_neighbouring_ranks_read_the_same_rows():
    places = [ParallelConfig(sequence=2).data_rank(rank, 6) for rank in range(6)]
    assert places == [DataRank(index, 3) for index in (0, 0, 1, 1, 2, 2)]
    assert [ParallelConfig().data_rank(rank, 2) for rank in range(2)] == [DataRank(0, 2), DataRank(1, 2)]
    assert [list(places[rank].streams(8)) for rank in (0, 2, 4)] == [[0, 3, 6], [1, 4, 7], [2, 5]]


@given(st.sampled_from([1, 2, 3, 6]), st.integers(1, 3), st.integers(1, 4))
def test_ranks_hold_consecutive_positions_of_every_row(size, rows, per_rank):
    x = torch.arange(rows * size * per_rank * 2).view(rows, size * per_rank, 2)
    parts = [SequenceGroup(None, size, index).own(x) for index in range(size)]
    assert torch.cat(parts, dim=1).equal(x)
    assert {part.shape[1] for part in parts} == {per_rank}


def test_readers_get_the_rows_of_so_many_ranks(make_config, manifest):
    config = make_config(parallel={"sequence": 2})
    start = StreamState.start(config.data.streams)
    ranks = [training_steps(config, manifest, start, config.parallel.data_rank(rank, 4)) for rank in range(4)]
    a, b, c, d = (next(steps).batch.input_ids for steps in ranks)
    assert a.equal(b)
    assert c.equal(d)
    whole = next(training_steps(config, manifest, start, SOLE_READER)).batch.input_ids
    assert torch.stack((a, c), dim=1).flatten(0, 1).equal(whole)


# ------------------------------------------------------------------------------------------------- on gloo ranks


def batch_of(rows: list[list[int]], length: int) -> Batch:
    """Rows of documents of these lengths; a fifth of the positions of the first half of each row are masked."""
    layout = layout_of(*rows, length=length)
    ids = torch.randint(VOCAB, (len(rows), length), generator=torch.Generator().manual_seed(0))
    columns = torch.arange(length)
    masked = (columns % 5 == 0) & (columns < length // 2) & (layout.document_ids > 0)
    return Batch(ids, torch.where(masked, ids, IGNORED), layout.document_ids, layout.position_ids)


def loss_and_gradients(model: MaskedLanguageModel, batch: Batch, layout: AttentionLayout) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses, correct = model(batch, layout)
    losses.sum().backward()
    counts = {"loss": losses.detach().double().sum(), "correct": correct.sum(), "masked": torch.tensor(len(losses))}
    return counts | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_differences(size: int) -> dict[str, float]:
    """By case, the largest difference of a loss, a count or a gradient from that of whole rows, as a share of it."""
    group, found = SequenceGroup.join(size, timedelta(seconds=60)), {}
    for name, (rows, length) in ROWS.items():
        for options in ({"qk_norm": True, "unet": True}, {"attention": "causal", "positions": "learned", "layers": []}):
            shape: dict[str, Any] = {"hidden_size": 32, "num_heads": 4, "num_layers": 4, "layers": LAYERS, **options}
            torch.manual_seed(0)
            model = MaskedLanguageModel(ModelConfig.model_validate(shape), VOCAB).double()
            model.encoder.checkpoint_every = 2
            batch = batch_of(rows, length)
            layout = AttentionLayout.from_batch(batch)
            whole = loss_and_gradients(model, batch, layout)
            parts = loss_and_gradients(model, group.own_positions(batch), layout.over(group))
            for value in parts.values():
                dist.all_reduce(value)
            found[f"{name}, {options}"] = max(
                float((parts[key] - value).abs().max() / value.abs().max()) for key, value in whole.items()
            )
    return found


def disagree(rank: int) -> str:
    """What ranks that share rows say when these differ."""
    group = SequenceGroup.join(2, timedelta(seconds=60))
    batch = batch_of([[64]], 64)
    batch = replace(batch, input_ids=batch.input_ids + rank)
    try:
        return str(agree_on_step(batch, 0, False, group))
    except UserError as error:
        return str(error)


def on_two_ranks(rank, one, two, moved):
    """Rows on one rank, on two, and from the one to the other and back."""
    train(rank, one, 2)
    train(rank, two, 2)
    codes = [train(rank, config, 2, steps) for config, steps in zip(moved, (5, 7, None), strict=True)]
    return largest_differences(2), disagree(rank), codes


def on_four_ranks(rank, configs):
    for config in configs:
        train(rank, config, 4)
    return largest_differences(4)


def validations(config) -> list[float]:
    records = RunFolder(config.run_folder).metrics()
    return [
        r[key] for r in records if "validation_loss" in r for key in ("validation_loss", "validation_masked_accuracy")
    ]


def assert_the_same_run(whole, other) -> None:
    for (step, loss, norm, rows), (other_step, other_loss, other_norm, other_rows) in zip(
        curve(whole), curve(other), strict=True
    ):
        assert (step, rows) == (other_step, other_rows)
        assert loss == pytest.approx(other_loss, abs=2e-5)
        assert norm == pytest.approx(other_norm, rel=1e-3)
    assert validations(whole) == pytest.approx(validations(other), abs=2e-5)
    last = [load_state(list_checkpoints(config.run_folder / "checkpoints")[-1]) for config in (whole, other)]
    assert last[0].to_json() == last[1].to_json()
    assert RunFolder(whole.run_folder).status().tokens == RunFolder(other.run_folder).status().tokens


@pytest.fixture
def make_run(make_config, manifest):
    def make(name: str, size: int, sharding: str = "optimizer", packing: str = "packed", **training: Any):
        config = make_config(
            name,
            parallel={"sequence": size},
            model={"num_heads": 4, "num_layers": 2, "layers": [{"span": 9}, {}]},
            data={"packing": packing, "sequence_length": 48},
            training={"precision": "fp32", "tokens": 9_500, "sharding": sharding, **training},
        )
        open_run_folder(config, manifest)
        return config

    return make


@pytest.mark.slow
def test_two_ranks_to_a_row_give_the_run_of_one_and_a_run_goes_from_one_to_the_other_and_back(make_run, tmp_path):
    one, two = make_run("one", 1), make_run("two", 2)
    moved = [make_run("moved", size) for size in (1, 2, 1)]
    results = run_on_ranks(on_two_ranks, 2, tmp_path / "ranks", one, two, moved)
    for differences, answer, codes in results:
        assert max(differences.values()) < 1e-6, differences
        assert "whole for another that shares its rows" in answer
        assert codes == [75, 75, 0]
    for other in (two, moved[0]):
        assert_the_same_run(one, other)


@pytest.mark.slow
def test_four_ranks_share_rows_in_twos_and_fours_at_every_stage(make_run, tmp_path):
    one, full, gradients, none = configs = [
        make_run("one", 1, packing="padded", tokens=2_000),
        make_run("full", 2, "full", packing="padded", tokens=2_000, micro_batch_size=3),
        make_run("gradients", 2, "gradients", packing="padded", tokens=2_000),
        make_run("none", 4, "none", packing="padded", tokens=2_000),
    ]
    for differences in run_on_ranks(on_four_ranks, 4, tmp_path / "ranks", configs):
        assert max(differences.values()) < 1e-6, differences
    for other in (full, gradients, none):
        assert_the_same_run(one, other)


@pytest.mark.slow
def test_the_command_line_trains_with_shared_rows(corpus_values, tmp_path):
    (tmp_path / "tiny.yaml").write_text(
        f"corpus: {{path: '{corpus_values['path']}'}}\n"
        "data: {sequence_length: 32, streams: 16, workers: 1}\n"
        "model: {hidden_size: 32, num_layers: 2, num_heads: 2}\n"
        "training: {tokens: 2_500, batch_size: 16, micro_batch_size: 8, precision: fp32}\n"
    )
    for name, ranks in (("alone", 1), ("shared", 2)):
        sizes = (f"parallel.sequence={ranks}", "--nproc", str(ranks))
        diptych(tmp_path, "train", "tiny.yaml", f"name={name}", *sizes, "--no-evaluate")
    alone, shared = (SimpleNamespace(run_folder=tmp_path / "runs" / name) for name in ("alone", "shared"))
    assert_the_same_run(alone, shared)
    assert len(curve(alone)) >= 5
