"""How a checkpoint gets its name, on one rank: in which order, behind which fence; and what is taken from it again."""

from pathlib import Path

import torch

from pretrain.checkpoint.folder import list_checkpoints, prune_checkpoints
from pretrain.checkpoint.format import TrainingState
from pretrain.data.stream.state import StreamState
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.training.load import load_checkpoint, newer_than
from pretrain.training.save import CheckpointSaver
from pretrain.training.zero.engine import Engine
from tests.disk_calls import disk_calls
from tests.ranks import run_on_ranks

NAME = "step-00000009"


class RefusedError(Exception):
    """What a fence raises."""


def new_engine(config):
    return Engine(MaskedLanguageModel(config.model, 120), config, 1, torch.device("cpu"))


def save_and_load(rank, config, folder):
    """Save behind a fence that lets through and behind one that does not; load it into another engine."""
    folder = Path(folder)
    with disk_calls() as calls:
        fences = [lambda: calls.append("fence")]
        saver = CheckpointSaver(folder, new_engine(config), config.checkpoint, range(16), lambda: fences[-1]())
        saver.save(TrainingState(9, 900, 7, StreamState.start(16), "x"), at_once=True)
    results = list(saver.finished())
    engine = new_engine(config)
    loaded = load_checkpoint(folder / NAME, engine)

    def refuse():
        raise RefusedError

    fences.append(refuse)
    saver.save(TrainingState(10, 1000, 8, StreamState.start(16), "x"), at_once=True)
    try:
        refused = list(saver.finished())
    except RefusedError:
        refused = "refused"
    there = sorted(path.name for path in folder.iterdir())
    return calls, [result.error for result in results], (loaded.step, engine.optimizer_steps), refused, there


def test_a_checkpoint_appears_whole_behind_its_fence_and_steps_that_were_not_taken_do_not_count(make_config, tmp_path):
    folder = tmp_path / "checkpoints"
    ((calls, errors, steps, refused, there),) = run_on_ranks(
        save_and_load, 1, tmp_path / "ranks", make_config(), str(folder)
    )
    *files, flush, fence, rename, parent = calls
    assert sorted(files) == [
        f"fsync {name}"
        for name in ("MANIFEST.json", "index.json", "logits.safetensors", "rank-00000.safetensors", "state.json")
    ]
    assert files[-1] == "fsync MANIFEST.json"
    assert [flush, fence] == [f"fsync {NAME}.tmp", "fence"]
    assert [rename, parent] == [f"rename {NAME}.tmp to {NAME}", "fsync checkpoints"]
    assert errors == [None]
    assert steps == (9, 7)  # Adam's bias correction goes by the steps that the optimizer took
    assert (refused, there) == ("refused", [NAME])


def test_checkpoints_newer_than_the_one_resumed_from_are_damaged_and_that_one_is_pruned_as_any(tmp_path):
    for step in (5, 7, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    damaged = newer_than(tmp_path / "step-00000007")
    assert damaged == [NAME]
    (tmp_path / "step-00000008").mkdir()
    prune_checkpoints(tmp_path, keep_last=1, keep_every=0, damaged=damaged)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000008", NAME]
