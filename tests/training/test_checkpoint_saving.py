"""Saving on two real ranks: in the background, on a full or read-only disk, behind a guard."""

import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.format import TrainingState, step_of
from pretrain.checkpoint.tensors import load_weights
from pretrain.checkpoint.verify import newest_valid_checkpoint, verify_checkpoint
from pretrain.data.stream.state import StreamState
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.training import save as checkpoint_save
from pretrain.training.save import CheckpointSaver
from pretrain.training.zero.engine import Engine
from tests.integration.test_whole_runs import diptych, losses, project, start, wait_for
from tests.ranks import run_on_ranks

__all__ = ["project"]
pytestmark = pytest.mark.slow


class RefusedError(Exception):
    """What a guard raises."""


class Saving:
    """A saver of a small engine on this rank."""

    def __init__(self, config, rank, folder, guard=lambda: None, damaged=()):
        self.config, self.rank, self.folder = config, rank, Path(folder)
        torch.manual_seed(0)
        self.engine = Engine(MaskedLanguageModel(config.model, 120), config, 2, torch.device("cpu"))
        self.saver = CheckpointSaver(self.folder, self.engine, config.checkpoint, range(rank, 16, 2), guard, damaged)

    def save(self, step, **options):
        self.saver.save(TrainingState(step, step, step, StreamState.start(16), "x"), **options)

    def results(self):
        self.saver.wait()
        return [(result.name, result.error) for result in self.saver.finished()]

    def there(self):
        """Steps whose checkpoints are valid, and hidden names."""
        dist.barrier()
        valid = [step_of(path) for path in list_checkpoints(self.folder) if not verify_checkpoint(path)]
        hidden = sorted(path.name for path in self.folder.glob(".*"))
        dist.barrier()
        return valid, hidden


def in_the_background(rank, config, folder):
    saving = Saving(config, rank, folder)
    before = {f"{f.kind}/{f.parameter}/{f.start}": f.tensor.clone() for f in saving.engine.partition.fragments()}
    gate = threading.Event()
    write = checkpoint_save.write_tensors

    def slowly(*arguments):
        gate.wait(20)
        return write(*arguments)

    checkpoint_save.write_tensors = slowly
    began = time.monotonic()
    saving.save(1)
    blocked, ended_at_once = time.monotonic() - began, list(saving.saver.finished())
    for fragment in saving.engine.partition.fragments():
        fragment.tensor.fill_(7.0)  # training goes on
    there_before = saving.there()[0]
    gate.set()
    saving.save(2)  # waits for the first
    saving.save(2)
    results = saving.results()
    first = saving.folder / "step-00000001" / f"rank-{rank:05d}.safetensors"
    as_it_was = all(tensor.equal(before[key]) for key, tensor in load_file(first).items())
    sevens = all(bool((weight == 7).all()) for weight in load_weights(saving.folder / "step-00000002").values())
    return blocked < 10, ended_at_once, there_before, results, as_it_was, sevens, saving.there()


def test_a_save_in_the_background_holds_the_values_of_its_step_and_the_next_one_waits(make_config, tmp_path):
    config = make_config(checkpoint={"keep_last": 5})
    folder = tmp_path / "checkpoints"
    saved = [("step-00000001", None), ("step-00000002", None)]
    expected = (True, [], [], saved, True, True, ([1, 2], []))
    assert run_on_ranks(in_the_background, 2, tmp_path / "ranks", config, str(folder)) == [expected] * 2


def failing(rank, config, folder):
    """Saves that fail in each way, and one that succeeds after each of them."""
    outcomes = {}
    refuse = []

    def guard():
        if refuse:
            raise RefusedError("a newer attempt is there")

    saving = Saving(config, rank, folder, guard)
    saving.save(1, at_once=True)
    outcomes["first"] = saving.results()
    write = checkpoint_save.write_tensors

    def full(path, *rest):
        if rank == 1:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, *rest)

    for name, at_once in (("full", True), ("full in the background", False)):
        checkpoint_save.write_tensors = full
        saving.save(2, at_once=at_once)
        results = saving.results()
        checkpoint_save.write_tensors = write
        outcomes[name] = ["No space left" in error for _, error in results], saving.there()
    refuse.append(True)
    saving.save(3)
    saving.saver.wait()
    try:
        outcomes["refused"] = list(saving.saver.finished())
    except RefusedError as error:
        outcomes["refused"] = str(error), saving.there()
    refuse.clear()
    if rank == 0:
        (saving.folder / "step-00000001" / "state.json").write_text("damaged")
    dist.barrier()
    again = CheckpointSaver(
        saving.folder, saving.engine, config.checkpoint, range(rank, 16, 2), damaged={"step-00000001"}
    )
    saving.saver = again
    for step in (4, 5, 6):
        saving.save(step)
    outcomes["kept"] = saving.results(), saving.there(), [step_of(p) for p in list_checkpoints(saving.folder)]
    saving.save(1, at_once=True)
    outcomes["replaced"] = saving.results(), saving.there()
    return outcomes


def test_a_save_that_fails_or_is_refused_leaves_what_was_there_and_the_next_one_succeeds(make_config, tmp_path):
    config = make_config(checkpoint={"keep_last": 2}, training={"sharding": "full"})
    for outcomes in run_on_ranks(failing, 2, tmp_path / "ranks", config, str(tmp_path / "checkpoints")):
        assert outcomes["first"] == [("step-00000001", None)]
        assert outcomes["full"] == outcomes["full in the background"] == ([True], ([1], []))
        assert outcomes["refused"] == ("a newer attempt is there", ([1], []))
        assert outcomes["kept"] == ([(f"step-{n:08d}", None) for n in (4, 5, 6)], ([5, 6], []), [1, 5, 6])
        assert outcomes["replaced"] == ([("step-00000001", None)], ([5, 6], []))


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of some bytes on a folder."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mounted = []

    def mount(folder: Path, size: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("this container may not mount file systems")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def events(run: Path) -> list[str]:
    try:
        return json.loads((run / "status.json").read_text())["events"]
    except (OSError, ValueError):
        return []


def test_a_disk_that_is_full_or_read_only_costs_saves_and_not_the_run_until_its_end(project, small_disk):
    command = ("train", "tiny.yaml", "name=full", "--nproc", "2", "--no-evaluate", "training.tokens=60_000")
    run = project / "runs" / "full"
    diptych(project, "train", "tiny.yaml", "name=other", "--nproc", "1", "--no-evaluate", "training.tokens=1_000")
    shutil.copytree(project / "runs" / "other", run)
    shutil.rmtree(run / "checkpoints")
    for file in ("metrics.jsonl", "status.json"):
        (run / file).unlink()
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("name: other", "name: full"))
    disk = small_disk(run / "checkpoints", 4_000_000)

    launcher = start(project, *command)
    wait_for(lambda: list_checkpoints(disk), "first checkpoint")
    with (disk / "ballast").open("wb") as ballast:
        try:
            while True:
                ballast.write(b"\0" * 65_536)
                ballast.flush()
        except OSError:
            pass
    assert launcher.wait(timeout=120) == 1
    failed = [event for event in events(run) if "could not be saved" in event]
    assert len(failed) >= 2, events(run)
    assert all("earlier checkpoints are intact" in event for event in failed)
    status = json.loads((run / "status.json").read_text())
    intact, warnings = newest_valid_checkpoint(disk)
    assert (status["state"], status["checkpoint"], warnings) == ("failed", intact.name, [])
    assert list(disk.glob(".*")) == []
    log = (run / "logs").rglob("rank-0000.log")
    assert any("the run ends without its last steps" in path.read_text() for path in log)
    reached = len(losses(run))
    assert reached > step_of(intact) + 10

    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    diptych(project, *command, check=1)
    assert any("Read-only file system" in event for event in events(run))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "ballast").unlink()
    diptych(project, *command)
    assert [step for step, *_ in losses(run)] == list(range(1, reached + 1))
    assert step_of(list_checkpoints(disk)[-1]) == reached


def test_a_damaged_newest_checkpoint_is_told_and_strict_refuses_it(project):
    command = ("train", "tiny.yaml", "--nproc", "1", "--no-evaluate")
    diptych(project, *command, "training.tokens=8_000")
    checkpoints = project / "runs" / "tiny" / "checkpoints"
    good, bad = list_checkpoints(checkpoints)[-2:]
    (bad / "rank-00000.safetensors").write_bytes(b"")
    (bad / "state.json").unlink()
    damage = f"step {step_of(bad)} is damaged: 2 of 5 files"
    refused = diptych(project, *command, "training.tokens=12_000", "--strict", check=2)
    assert damage in refused
    assert "Without --strict" in refused
    assert sorted(path.name for path in bad.iterdir()) == sorted(
        ["MANIFEST.json", "index.json", "logits.safetensors", "rank-00000.safetensors"]
    )
    diptych(project, *command, "training.tokens=12_000")
    said = events(project / "runs" / "tiny")
    assert any(event.startswith(damage) and event.endswith(f"resuming from {step_of(good)}") for event in said), said
    newest = list_checkpoints(checkpoints)[-1]
    assert verify_checkpoint(newest) == []
    for path in list_checkpoints(checkpoints):
        for file in path.iterdir():
            file.write_bytes(b"")
    assert "no checkpoint in" in diptych(project, *command, "training.tokens=16_000", check=2)
