"""Any number of ranks and any ZeRO stage resume from any other: weights, moments, and the losses that follow."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint.folder import load_state
from pretrain.checkpoint.logits import compare_logits, load_logits
from pretrain.data.manifest import load_manifest
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from pretrain.training.load import load_checkpoint
from pretrain.training.save import engine_logits
from pretrain.training.trainer import Trainer
from tests.conftest import tiny_run
from tests.ranks import run_on_ranks, trainer_of

STAGES = ("none", "optimizer", "gradients", "full")
SAVED, LATER = 5, 8
"""The step of the checkpoint, and how many steps are compared after it."""
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
"""Nats between losses that ranks and stages sum in another order."""

pytestmark = pytest.mark.slow


class NoStop:
    requested = False
    signal_name = None


def make_run(corpus_values, folder: Path, name: str, sharding: str, precision: str):
    """A run through two phases, one of which begins before the checkpoint and one after it."""
    sections = {
        "training": {"sharding": sharding, "precision": precision, "tokens": 6_500, "micro_batch_size": 4},
        "checkpoint": {"every": SAVED, "keep_last": 9, "async": sharding != "full"},
        "phases": [{"from_tokens": 1_200, "rotary_theta": 500.0}, {"from_tokens": 4_000, "mask_rate": 0.3}],
        "schedule": {"warmup": 0.3, "decay": 0.5},
    }
    config = tiny_run(corpus_values, folder / "runs", name, **{k: v for k, v in sections.items() if k != "phases"})
    return type(config).model_validate(config.model_dump() | {"phases": sections["phases"]})


def whole_values(engine) -> dict[str, torch.Tensor]:
    """Weights, moments and step count as the live engine has them, put together from all ranks."""
    values = {}
    for name, shape in engine.parameter_shapes.items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            values[f"{kind}/{name}"] = torch.full((torch.Size(shape).numel(),), -torch.inf)
    for fragment in engine.partition.fragments():
        values[f"{fragment.kind}/{fragment.parameter}"][fragment.start : fragment.stop] = fragment.tensor
    if dist.get_world_size() > 1:
        for value in values.values():
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
    values["optimizer_steps"] = torch.tensor(engine.optimizer_steps)
    return values


def losses(config) -> list[float]:
    records = RunFolder(config.run_folder).metrics()
    return [(r["loss"], r["rows_checksum"], r["learning_rate"]) for r in records if "loss" in r]


def train_and_save(rank, world_size, configs, folder):
    """An unbroken run at each stage; what the engine held when the checkpoint was saved goes into a file."""
    for config in configs:

        class Recording(Trainer):
            def save(self, *, last=False, path=Path(folder) / f"{config.name}.pt"):
                if self.state.step == SAVED:
                    values = whole_values(self.engine)
                    if rank == 0:
                        torch.save(values, path)
                super().save(last=last)

        assert trainer_of(config, rank, world_size, trainer=Recording).fit() == 0


def load_and_train(rank, world_size, loaders, savers, folder):
    """At each stage: load every checkpoint and compare; then continue after those that are named."""
    problems = []
    for config, checkpoint, continued in loaders:
        if rank == 0:
            open_run_folder(config, load_manifest(config.corpus.path))
            shutil.copytree(checkpoint, config.run_folder / "checkpoints" / checkpoint.name)
        dist.barrier()
        trainer = trainer_of(config, rank, world_size)
        if not continued:
            for name, saved in savers.items():
                state = load_checkpoint(saved, trainer.engine)
                trainer.engine.enter_phase(config.in_phase(1))
                values, expected = whole_values(trainer.engine), torch.load(Path(folder) / f"{name}.pt")
                problems += [(config.name, name, key) for key in expected if not expected[key].equal(values[key])]
                problems += [(config.name, name, "state")] if state.to_json() != load_state(saved).to_json() else []
                logits = load_logits(saved)
                difference, allowed = compare_logits(logits, engine_logits(trainer.engine).logits)
                problems += [(config.name, name, difference)] if difference > allowed else []
        else:
            assert trainer.fit() == 0
    return problems


def compare_topologies(corpus_values, folder, precision, saver_sizes, loader_sizes, others):
    """`others(saver, loader)`: whether the run is continued besides being loaded."""
    (folder / "values").mkdir()
    savers = {}
    for size in saver_sizes:
        configs = [make_run(corpus_values, folder, f"{size}-{s}", s, precision) for s in STAGES]
        for config in configs:
            open_run_folder(config, load_manifest(config.corpus.path))
        run_on_ranks(train_and_save, size, folder / f"save-{size}", size, configs, folder / "values")
        savers |= {(size, config.training.sharding): config for config in configs}
    paths = {c.name: c.run_folder / "checkpoints" / f"step-{SAVED:08d}" for c in savers.values()}
    compared = []
    for size in loader_sizes:
        loaders = []
        for stage in STAGES:
            first = next(iter(paths.values()))
            loaders.append((make_run(corpus_values, folder, f"all-to-{size}-{stage}", stage, precision), first, False))
            for saver, config in savers.items():
                if saver == (size, stage) or others(saver, (size, stage)):
                    moved = make_run(corpus_values, folder, f"{config.name}-to-{size}-{stage}", stage, precision)
                    loaders.append((moved, paths[config.name], True))
                    compared.append((config, moved, saver == (size, stage)))
        problems = run_on_ranks(load_and_train, size, folder / f"load-{size}", size, loaders, paths, folder / "values")
        assert problems == [[]] * size
    for saved, moved, same in compared:
        before, after = losses(saved), losses(moved)
        assert [row[1:] for row in before[SAVED:]] == [row[1:] for row in after]
        assert len(after) >= LATER
        differences = [abs(a[0] - b[0]) for a, b in zip(before[SAVED:], after, strict=True)]
        assert max(differences[:LATER]) <= (0 if same else TOLERANCE[precision]), (saved.name, moved.name, differences)
    return len(compared)


@pytest.mark.timeout(900)
def test_every_pair_of_1_2_4_ranks_and_stages_0_to_3_resumes_in_fp32(corpus_values, tmp_path):
    def others(saver, loader):
        """Each loader continues one run of another number of ranks and another stage, all combinations in turn."""
        (size, stage), (other_size, other_stage) = loader, saver
        turn = STAGES.index(stage) + (1, 2, 4).index(size)
        return other_size == (1, 2, 4)[turn % 3] and STAGES.index(other_stage) == (turn + 1) % 4

    assert compare_topologies(corpus_values, tmp_path, "fp32", (1, 2, 4), (1, 2, 4), others) >= 20


@pytest.mark.timeout(900)
def test_every_change_of_stage_resumes_in_bf16_on_another_number_of_ranks(corpus_values, tmp_path):
    assert compare_topologies(corpus_values, tmp_path, "bf16", (2,), (1,), lambda *_: True) == 16
