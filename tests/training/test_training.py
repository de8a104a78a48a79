"""Whole trainings on real gloo ranks, small enough to be fast."""

import math
import os
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint.folder import list_checkpoints, load_state
from pretrain.checkpoint.tensors import load_weights
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from pretrain.training.monitor.monitor import Monitor
from pretrain.training.trainer import Trainer
from tests.ranks import run_on_ranks, trainer_of

STAGES = ("none", "optimizer", "gradients", "full")


def curve(config) -> list[tuple]:
    records = RunFolder(config.run_folder).metrics()
    return [(r["step"], r["loss"], r["grad_norm"], r["rows_checksum"]) for r in records if "loss" in r]


def train(rank, config, world_size, stop_after=None):
    """Train; after some steps of this start, a stop request comes on rank 1, as a signal to one process would."""
    request = SimpleNamespace(signal_name=None, requested=False)

    class Stopping(Monitor):
        def step_ended(self, state, *of_step):
            super().step_ended(state, *of_step)
            if rank == 1 and stop_after and state.step - first == stop_after:
                request.signal_name, request.requested = "SIGTERM", True

    trainer = trainer_of(config, rank, world_size, request, monitor=Stopping)
    first = trainer.state.step
    return trainer.fit()


def train_whole_and_in_pieces(rank, pairs):
    codes = []
    for whole, broken in pairs:
        codes.append([train(rank, whole, 2)] + [train(rank, broken, 2, n) for n in (5, 7, None)])
    return codes


def train_on_two_nodes(rank, config, stop_after):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return train(rank, config, 4, stop_after)


@pytest.mark.slow
def test_a_hybrid_run_stopped_and_resumed_goes_on_as_the_whole_run_of_full_would(make_config, manifest, tmp_path):
    training = {"precision": "bf16", "tokens": 4_000}
    full = make_config("full", training={"sharding": "full", **training})
    hybrid = make_config("hybrid", training={"sharding": "hybrid", **training})
    for config in (full, hybrid):
        open_run_folder(config, manifest)
    # DeepSpeed makes the groups of nodes once per process: each start has processes of its own, as a run's have.
    for number, (config, stop_after, code) in enumerate([(full, None, 0), (hybrid, 3, 75), (hybrid, None, 0)]):
        assert run_on_ranks(train_on_two_nodes, 4, tmp_path / f"{number}", config, stop_after) == [code] * 4
    assert curve(full) == curve(hybrid)
    assert len(curve(full)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_stopped_and_resumed_twice_continues_bit_for_bit_at_every_stage(
    make_config, manifest, tmp_path, precision
):
    pairs = []
    for stage in STAGES:
        training = {"sharding": stage, "precision": precision, "tokens": 8_000}
        pair = [make_config(f"{stage}-{kind}", training=training) for kind in ("whole", "broken")]
        for config in pair:
            open_run_folder(config, manifest)
        pairs.append(pair)
    codes = run_on_ranks(train_whole_and_in_pieces, 2, tmp_path / "ranks", pairs)
    assert codes == [[[0, 75, 75, 0]] * 4] * 2
    for whole, broken in pairs:
        assert curve(whole) == curve(broken)
        assert len(curve(whole)) >= 16
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


def poison(rank, cases, world_size):
    return [poisoned(rank, config, world_size, what, steps) for config, what, steps in cases]


def poisoned(rank, config, world_size, what, steps):
    """Train with a loss or a gradient made infinite, NaN or large on one rank at the rows of some steps."""
    now = SimpleNamespace(bad=False)

    class Poisoned(Trainer):
        def take(self, rows, totals):
            now.bad = rank == 1 and rows.state.position // 16 in steps
            super().take(rows, totals)

    trainer = trainer_of(config, rank, world_size, trainer=Poisoned)
    forward = trainer.engine.forward

    def altered(*arguments):
        losses, correct = forward(*arguments)
        if what != "inf gradient" and now.bad and trainer.engine.module.training:
            losses = losses * (math.nan if what == "nan loss" else 50.0)
        return losses, correct

    trainer.engine.forward = altered
    weight = next(iter(trainer.engine.module.parameters()))
    weight.register_hook(lambda gradient: gradient * math.inf if what == "inf gradient" and now.bad else gradient)
    try:
        code = trainer.fit()
    except FloatingPointError as error:
        code = str(error)
    finite = all(bool(torch.isfinite(f.tensor).all()) for f in trainer.engine.partition.fragments())
    return code, finite, trainer.state.step, trainer.state.optimizer_steps


def skipped(config):
    return [r["step"] for r in RunFolder(config.run_folder).metrics() if "skipped" in r]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_many_in_a_row_end_the_run(
    make_config, manifest, tmp_path, precision
):
    cases = []
    for stage in STAGES:
        for number, (what, spikes, steps) in enumerate(
            [
                ("nan loss", "off", {3, 4, 8}),
                ("nan loss", "skip", {3, 4, 8}),
                ("inf gradient", "off", {3, 4, 8}),
                ("nan loss", "off", {4, 5, 6}),
            ]
        ):
            training = {"sharding": stage, "max_skipped_steps": 3, "tokens": 5_000, "precision": precision}
            config = make_config(f"{stage}-{number}", training={**training, "spikes": spikes})
            open_run_folder(config, manifest)
            cases.append((config, what, steps))
    results = run_on_ranks(poison, 2, tmp_path / "ranks", cases, 2)
    assert results[0] == results[1]
    for (config, what, steps), (code, finite, step, optimizer_steps) in zip(cases, results[0], strict=True):
        assert finite, (config.name, what)
        assert skipped(config) == sorted(steps), (config.name, what)
        assert step - optimizer_steps == 3
        status = RunFolder(config.run_folder).status()
        assert status.skipped_steps == 3
        if steps == {4, 5, 6}:
            assert "3 steps in a row were skipped" in code
            assert (step, status.state) == (6, "failed")
        else:
            assert code == 0


@pytest.mark.slow
def test_a_spike_is_taken_skipped_or_gone_back_from_and_a_resumed_run_decides_alike(make_config, manifest, tmp_path):
    lone, lasting = {40, 45}, set(range(47, 51))
    training = {"tokens": 25_000, "precision": "fp32", "max_skipped_steps": 4, "log_every": 7}
    cases = []
    for name, spikes, steps in [
        ("off", "off", lone),
        ("skip", "skip", lone),
        ("again", "skip", lone),
        ("stop", "skip", lasting),
        ("back", "rollback", lasting),
    ]:
        config = make_config(name, training={**training, "spikes": spikes}, checkpoint={"every": 20})
        open_run_folder(config, manifest)
        cases.append((config, "spike", steps))
    off, skip, again, stop, back = (config for config, *_ in cases)
    run_on_ranks(train, 2, tmp_path / "first part", again, 2, 36)
    results = run_on_ranks(poison, 2, tmp_path / "ranks", cases, 2)
    assert results[0] == results[1]
    codes = [code for code, *_ in results[0]]
    assert codes[:3] == [0, 0, 0]
    assert skipped(off) == []
    assert sum("is a spike" in event for event in RunFolder(off.run_folder).status().events) == 2
    assert skipped(skip) == skipped(again) == [40, 45]
    assert str(curve(skip)) == str(curve(again))
    assert "4 steps in a row were skipped" in codes[3]
    assert skipped(stop) == [47, 48, 49, 50]
    assert codes[4] == 0
    assert any("back to step-00000040" in event for event in RunFolder(back.run_folder).status().events)
    # The rows of the first 40 steps, then those behind the 50th: the offending ones were read and left behind.
    rows, plain = ([checksum for *_, checksum in curve(config)] for config in (back, off))
    assert (rows[:40], rows[40]) == (plain[:40], plain[50])
    assert [step for step, *_ in curve(back)] == list(range(1, len(rows) + 1))


@pytest.mark.slow
def test_a_run_that_skipped_every_step_does_not_look_done(make_config, manifest, tmp_path):
    config = make_config(training={"tokens": 3_000, "precision": "fp32", "max_skipped_steps": 100})
    open_run_folder(config, manifest)
    case = (config, "inf gradient", range(10_000))
    for ((code, *_),) in run_on_ranks(poison, 2, tmp_path / "ranks", [case], 2):
        assert "nothing was learned" in code
    status = RunFolder(config.run_folder).status()
    assert (status.state, status.skipped_steps) == ("failed", status.step)


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
    longer = make_config(training={"tokens": 50_000})
    lines = open_run_folder(longer, manifest)
    assert "changed since: training.tokens 40000 -> 50000" in lines
    reseeded = longer.model_copy(update={"seed": 8})
    with pytest.raises(UserError, match="--allow-change seed"):
        open_run_folder(reseeded, manifest)
    assert open_run_folder(reseeded, manifest, ["seed"])


@pytest.mark.usefixtures("finished")
def test_a_run_of_another_corpus_is_refused(make_config, manifest):
    other = manifest.model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(UserError, match="another corpus"):
        open_run_folder(make_config(training={"tokens": 3_000}), other)
