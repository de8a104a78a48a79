"""Muon under ZeRO: every stage trains as one rank does, resumes bit for bit, and takes the checkpoints of others."""

import math
import shutil

import pytest
import torch

from pretrain.checkpoint.tensors import SavedFragments
from pretrain.data.manifest import load_manifest
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from pretrain.training.cost.memory import Spread, model_states
from pretrain.training.cost.need import optimizer_shape
from pretrain.training.load import load_checkpoint
from pretrain.training.zero.settings import ZERO_STAGE
from tests.conftest import tiny_run
from tests.ranks import run_on_ranks, trainer_of

SAVED = 6
RANKS = 2
TOLERANCE = 1e-4
"""Nats between losses that ranks and stages sum in another order."""


def config_of(corpus_values, folder, name, sharding, kind="muon"):
    training = {"sharding": sharding, "precision": "fp32", "tokens": 4_500}
    sections = {"checkpoint": {"every": SAVED, "keep_last": 9}, "optimizer": {"kind": kind, "learning_rate": 1e-2}}
    # Of three layers, stages 1 and 2 cut the second one, inside a matrix.
    config = tiny_run(corpus_values, folder / "runs", name, training=training, model={"num_layers": 3}, **sections)
    open_run_folder(config, load_manifest(config.corpus.path))
    return config


def curve(config):
    return [record["loss"] for record in RunFolder(config.run_folder).metrics() if "loss" in record]


def checkpoint_of(config):
    return config.run_folder / "checkpoints" / f"step-{SAVED:08d}"


def train_all(rank, world_size, configs):
    """Train each to its end; returns the bytes of the optimizer's states in its engine."""
    found = []
    for config in configs:
        trainer = trainer_of(config, rank, world_size)
        assert trainer.fit() == 0
        states = trainer.engine.torch_optimizer.state.values()
        found.append(sum(value.numel() * 4 for state in states for value in state.values()))
    return found


def differing(engine, path):
    """What this rank holds that is not that of a checkpoint; moments must be zero before the optimizer's first step."""
    saved, found = SavedFragments(path), []
    for fragment in engine.partition.fragments():
        expected = torch.zeros_like(fragment.tensor)
        if fragment.kind == "weight" or engine.optimizer_steps:
            saved.fill(fragment.kind, fragment.parameter, fragment.start, expected)
        if not fragment.tensor.equal(expected):
            found.append((fragment.kind, fragment.parameter))
    return found


def resume_all(rank, world_size, configs, of_one_rank, of_adamw):
    """What goes wrong in engines that load the checkpoints of others; then each run goes on from its own."""
    problems = []
    for config in configs:
        trainer = trainer_of(config, rank, world_size)
        assert trainer.state.step == SAVED
        for path, steps in ((of_one_rank, SAVED), (of_adamw, 0), (checkpoint_of(config), SAVED)):
            load_checkpoint(path, trainer.engine)
            problems += [(config.name, path, *other) for other in differing(trainer.engine, path)]
            problems += [(config.name, path, "steps")] if trainer.engine.optimizer_steps != steps else []
        assert trainer.fit() == 0
    return problems


@pytest.mark.slow
def test_every_stage_trains_as_one_rank_does_and_resumes_bit_for_bit(corpus_values, tmp_path):
    alone = config_of(corpus_values, tmp_path, "alone", "none")
    adamw = config_of(corpus_values, tmp_path, "adamw", "optimizer", "adamw")
    configs = [config_of(corpus_values, tmp_path, stage, stage) for stage in ZERO_STAGE if stage != "hybrid"]
    run_on_ranks(train_all, 1, tmp_path / "one", 1, [alone, adamw])
    found = run_on_ranks(train_all, RANKS, tmp_path / "train", RANKS, configs)
    shape = optimizer_shape(alone.model, load_manifest(alone.corpus.path).tokenizer.vocab_size, alone.optimizer)
    for config, *states in zip(configs, *found, strict=True):
        assert curve(config) == pytest.approx(curve(alone), abs=TOLERANCE), config.name
        planned = model_states(shape.sizes, shape.moments, Spread.of(config, RANKS, "fp32"))
        assert states == [planned.optimizer] * RANKS, config.name
    assert math.dist(curve(alone), curve(adamw)) > 0.1
    resumed = [config_of(corpus_values, tmp_path, f"{config.name}-resumed", config.name) for config in configs]
    for config, again in zip(configs, resumed, strict=True):
        shutil.copytree(checkpoint_of(config), checkpoint_of(again))
    others = checkpoint_of(alone), checkpoint_of(adamw)
    assert run_on_ranks(resume_all, RANKS, tmp_path / "resume", RANKS, resumed, *others) == [[]] * RANKS
    for config, again in zip(configs, resumed, strict=True):
        assert curve(config)[SAVED:] == curve(again), config.name
        assert len(curve(again)) >= 3
