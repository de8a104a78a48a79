"""Whole trainings on real gloo ranks, small enough to be fast."""

import math

import pytest
import torch

from pretrain.errors import UserError
from pretrain.training.checkpoint import list_checkpoints, load_state, load_weights
from pretrain.training.fragments import fragments
from pretrain.training.metrics import read_metrics
from pretrain.training.run_folder import open_run_folder
from pretrain.training.trainer import Trainer
from tests.ranks import run_on_ranks

STAGES = ("none", "optimizer", "gradients", "full")


class StopAfter:
    """A stop request that comes on rank 1 after some steps, as a signal to one process would."""

    signal_name = "SIGTERM"

    def __init__(self, rank: int, steps: int) -> None:
        self._left = steps if rank == 1 else math.inf

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0


def curve(config) -> list[tuple]:
    records = read_metrics(config.run_folder / "metrics.jsonl")
    return [(r["step"], r["loss"], r["grad_norm"], r["rows_checksum"]) for r in records if "loss" in r]


def train(rank, config, world_size, stop_after=math.inf):
    return Trainer(config, rank, world_size, torch.device("cpu"), StopAfter(rank, stop_after)).train()


def train_whole_and_in_pieces(rank, pairs):
    codes = []
    for whole, broken in pairs:
        codes.append([train(rank, whole, 2)] + [train(rank, broken, 2, n) for n in (5, 7, math.inf)])
    return codes


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_run_stopped_and_resumed_twice_continues_bit_for_bit_at_every_stage(
    make_config, manifest, tmp_path, precision
):
    pairs = []
    for stage in STAGES:
        training = {"sharding": stage, "precision": precision}
        pair = [make_config(f"{stage}-{kind}", training=training) for kind in ("whole", "broken")]
        for config in pair:
            open_run_folder(config, manifest)
        pairs.append(pair)
    codes = run_on_ranks(train_whole_and_in_pieces, 2, tmp_path / "ranks", pairs)
    assert codes == [[[0, 75, 75, 0]] * 4] * 2
    for whole, broken in pairs:
        assert curve(whole) == curve(broken)
        assert len(curve(whole)) >= 25
        last = [list_checkpoints(config.run_folder / "checkpoints")[-1] for config in (whole, broken)]
        weights = [load_weights(path) for path in last]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
        assert load_state(last[0]).to_json() == load_state(last[1]).to_json()
    losses = [curve(whole)[-1][1] for whole, _ in pairs]
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert max(losses) - min(losses) < tolerance, losses
    assert losses[0] < curve(pairs[0][0])[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["optimizer", "full"])
def test_dropout_and_dropped_positions_continue_bit_for_bit_with_blocks_computed_again(
    make_config, manifest, tmp_path, sharding
):
    training = {"sharding": sharding, "precision": "fp32", "tokens": 6_000, "activation_checkpointing": "full"}
    model = {"dropout": 0.1, "drop_positions_after": 3_000, "unet": True, "qk_norm": True, "layers": [{"span": 9}, {}]}
    pair = [make_config(kind, training=training, model=model) for kind in ("whole", "broken")]
    for config in pair:
        open_run_folder(config, manifest)
    assert run_on_ranks(train_whole_and_in_pieces, 2, tmp_path / "ranks", [pair]) == [[[0, 75, 75, 0]]] * 2
    assert curve(pair[0]) == curve(pair[1])


@pytest.mark.slow
def test_a_run_continues_on_other_ranks_and_another_stage(make_config, manifest, tmp_path):
    whole, moved = (
        make_config("whole", training={"precision": "fp32"}),
        make_config("moved", training={"precision": "fp32"}),
    )
    for config in (whole, moved):
        open_run_folder(config, manifest)
    run_on_ranks(train, 2, tmp_path / "a", whole, 2)
    run_on_ranks(train, 2, tmp_path / "b", moved, 2, 9)
    other_stage = make_config("moved", training={"precision": "fp32", "sharding": "full"})
    assert open_run_folder(other_stage, manifest)[0].endswith("at step 9")
    assert run_on_ranks(train, 1, tmp_path / "c", other_stage, 1) == [0]
    for (step, loss, _, rows), (other_step, other_loss, _, other_rows) in zip(curve(whole), curve(moved), strict=True):
        assert (step, rows) == (other_step, other_rows)
        assert loss == pytest.approx(other_loss, abs=2e-5)


def poison(rank, config, world_size, steps):
    """Train with a gradient made NaN on one rank at some steps."""
    trainer = Trainer(config, rank, world_size, torch.device("cpu"), StopAfter(rank, math.inf))
    weight = next(iter(trainer.engine.module.parameters()))

    def hook(gradient):
        if rank == 0 and trainer.state.step + 1 in steps:
            return gradient * math.nan
        return gradient

    weight.register_hook(hook)
    try:
        code = trainer.train()
    except FloatingPointError as error:
        code = str(error)
    finite = all(bool(torch.isfinite(f.tensor).all()) for f in fragments(trainer.engine))
    return code, finite, trainer.state.step, trainer.state.optimizer_steps


@pytest.mark.slow
@pytest.mark.parametrize("sharding", STAGES)
def test_a_step_with_nan_gradients_on_one_rank_is_skipped_on_all_and_many_in_a_row_end_the_run(
    make_config, manifest, tmp_path, sharding
):
    config = make_config(training={"sharding": sharding, "max_skipped_steps": 3, "tokens": 6_000, "precision": "bf16"})
    open_run_folder(config, manifest)
    for code, finite, steps, optimizer_steps in run_on_ranks(poison, 2, tmp_path / "a", config, 2, {3, 4, 8}):
        assert (code, finite, steps - optimizer_steps) == (0, True, 3)
    norms = [norm for _, _, norm, _ in curve(config)]
    assert [i + 1 for i, norm in enumerate(norms) if not math.isfinite(norm)] == [3, 4, 8]
    bad = make_config("bad", training=config.training.model_dump())
    open_run_folder(bad, manifest)
    for code, finite, steps, _ in run_on_ranks(poison, 2, tmp_path / "b", bad, 2, {4, 5, 6}):
        assert "3 steps in a row" in code
        assert (finite, steps) == (True, 6)


@pytest.mark.slow
def test_the_loss_is_a_sum_over_masked_tokens_whatever_the_micro_batches_and_ranks(make_config, manifest, tmp_path):
    curves = []
    for number, (world_size, micro) in enumerate([(1, 16), (1, 3), (2, 4)]):
        training = {"tokens": 2_000, "precision": "fp32", "sharding": "none", "micro_batch_size": micro}
        config = make_config(f"run-{number}", training=training)
        open_run_folder(config, manifest)
        run_on_ranks(train, world_size, tmp_path / str(number), config, world_size)
        curves.append(curve(config))
    for step in zip(*curves, strict=True):
        assert len({rows for *_, rows in step}) == 1
        for _, loss, norm, _ in step[1:]:
            assert loss == pytest.approx(step[0][1], rel=1e-5)
            assert norm == pytest.approx(step[0][2], rel=1e-4)


@pytest.mark.usefixtures("finished")
def test_a_folder_that_holds_another_run_is_refused_until_the_change_is_named(make_config, manifest):
    wider = make_config(model={"hidden_size": 64})
    with pytest.raises(UserError, match=r"holds another run:\n  model.hidden_size: 32 there, 64 now"):
        open_run_folder(wider, manifest)
    longer = make_config(training={"tokens": 4_000})
    lines = open_run_folder(longer, manifest)
    assert "changed since: training.tokens 3000 -> 4000" in lines
    reseeded = make_config(training={"tokens": 4_000})
    reseeded = reseeded.model_copy(update={"seed": 8})
    with pytest.raises(UserError, match="--allow-change seed"):
        open_run_folder(reseeded, manifest)
    assert open_run_folder(reseeded, manifest, ["seed"])


@pytest.mark.usefixtures("finished")
def test_a_run_of_another_corpus_is_refused(make_config, manifest):
    other = manifest.model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(UserError, match="another corpus"):
        open_run_folder(make_config(training={"tokens": 3_000}), other)
