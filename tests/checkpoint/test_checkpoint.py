"""Checkpoints on the disk: any damage is seen, nothing hostile is executed, nothing that counts is removed."""

import contextlib
import json
import math
import os
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.checkpoint.folder import (
    list_checkpoints,
    newest_state,
    prune_checkpoints,
    remove_checkpoint,
    remove_leftovers,
)
from pretrain.checkpoint.format import CheckpointManifest, FileEntry, read_manifest, step_of
from pretrain.checkpoint.logits import load_logits
from pretrain.checkpoint.tensors import load_weights
from pretrain.checkpoint.verify import find_checkpoint, newest_valid_checkpoint, verify_checkpoint
from pretrain.checkpoint.writing import publish
from pretrain.errors import UserError
from pretrain.files import sha256_of

FILES = ("MANIFEST.json", "index.json", "logits.safetensors", "rank-00000.safetensors", "state.json")


@pytest.fixture
def checkpoints(finished):
    """Three checkpoints of a run."""
    return finished.run_folder / "checkpoints"


def reseal(path):
    """Give a changed checkpoint the digests of what it holds now, as whoever changed it on purpose would."""
    files = {
        file.name: FileEntry(bytes=file.stat().st_size, sha256=sha256_of(file))
        for file in path.iterdir()
        if file.name != "MANIFEST.json"
    }
    (path / "MANIFEST.json").write_bytes(CheckpointManifest(format=2, step=step_of(path), files=files).sealed())


def test_a_checkpoint_is_weights_and_moments_once_and_no_pickle(checkpoints):
    path = list_checkpoints(checkpoints)[-1]
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    shapes = json.loads((path / "index.json").read_bytes())["shapes"]
    stored = (path / "rank-00000.safetensors").stat().st_size
    assert 0 <= stored - 12 * sum(map(math.prod, shapes.values())) < 20_000
    tensors = load_file(path / "rank-00000.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------- damage


def test_missing_swapped_old_and_foreign_files_are_seen_and_the_newest_whole_one_is_taken(checkpoints):
    good, bad = list_checkpoints(checkpoints)[-2:]
    pristine = bad.with_name("pristine")
    shutil.copytree(bad, pristine)
    assert verify_checkpoint(bad) == []

    def damaged(file, kind):
        problems = verify_checkpoint(bad)
        path, warnings = newest_valid_checkpoint(checkpoints)
        assert (path, len(warnings)) == (good, 1), (file, kind)
        assert warnings[0].startswith(f"step {step_of(bad)} is damaged: "), warnings
        shutil.rmtree(bad)
        shutil.copytree(pristine, bad)
        return problems

    for file in FILES:
        for kind in ("flip", "cut", "remove", "swap", "empty"):
            victim = bad / file
            content = bytearray(victim.read_bytes())
            if kind == "swap" and content == (good / file).read_bytes():
                continue  # the index does not depend on the step
            if kind == "flip":
                content[len(content) // 3] ^= 4
                victim.write_bytes(content)
            elif kind == "cut":
                victim.write_bytes(content[:-1])
            elif kind == "empty":
                victim.write_bytes(b"")
            elif kind == "remove":
                victim.unlink()
            else:
                shutil.copy(good / file, victim)
            problems = damaged(file, kind)
            assert len(problems) == 1
            assert file in problems[0]
    (bad / "rank-00001.safetensors").write_bytes(b"")
    assert damaged("foreign", "file") == ["rank-00001.safetensors does not belong to it"]
    (bad / "folder").mkdir()
    assert damaged("foreign", "folder") == ["folder does not belong to it"]
    (bad / "MANIFEST.json").unlink()
    os.mkfifo(bad / "MANIFEST.json")
    assert damaged("MANIFEST.json", "pipe") == ["MANIFEST.json is missing"]
    shutil.rmtree(bad)
    shutil.copytree(good, bad)
    assert damaged("all", "renamed") == [f"MANIFEST.json is of step {step_of(good)}"]


def test_whoever_asks_for_the_newest_checkpoint_is_warned_of_damaged_ones(checkpoints, caplog):
    good, bad = list_checkpoints(checkpoints)[-2:]
    (bad / "state.json").unlink()
    assert find_checkpoint(checkpoints) == good
    assert (
        f"step {step_of(bad)} is damaged: 1 of 5 files (state.json is missing); taking step {step_of(good)}"
        in caplog.text
    )


def test_damage_is_told_in_a_line(checkpoints):
    good, bad = list_checkpoints(checkpoints)[-2:]
    (bad / "state.json").unlink()
    (bad / "index.json").write_text("{}")
    _, (line,) = newest_valid_checkpoint(checkpoints)
    assert line == f"step {step_of(bad)} is damaged: 2 of 5 files (index.json is damaged, state.json is missing)"
    assert newest_state(checkpoints).step == step_of(good)


@pytest.mark.parametrize("file", FILES)
def test_200_random_bit_flips_and_200_truncations_of_each_file_are_all_seen(checkpoints, file):
    path = list_checkpoints(checkpoints)[-1]
    victim, chosen = path / file, random.Random(file)
    content = victim.read_bytes()
    seen = 0
    for _ in range(200):
        flipped = bytearray(content)
        bit = chosen.randrange(8 * len(content))
        flipped[bit // 8] ^= 1 << bit % 8
        victim.write_bytes(flipped)
        seen += bool(verify_checkpoint(path))
    for _ in range(200):
        victim.write_bytes(content[: chosen.randrange(len(content))])
        seen += bool(verify_checkpoint(path))
    assert seen == 400
    victim.write_bytes(content)
    assert verify_checkpoint(path) == []


def test_safetensors_alone_would_not_see_a_flipped_bit(checkpoints):
    """Why there are digests."""
    victim = list_checkpoints(checkpoints)[-1] / "rank-00000.safetensors"
    content, chosen = victim.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    seen = 0
    for _ in range(200):
        flipped = bytearray(content)
        flipped[chosen.randrange(header, len(content))] ^= 1 << chosen.randrange(8)
        victim.write_bytes(flipped)
        try:
            load_file(victim)
        except Exception:  # noqa: BLE001
            seen += 1
    assert seen == 0


# --------------------------------------------------------------------------------------------------------- hostile


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickled(marker):
    return pickle.dumps(Payload(marker))


def torch_saved(marker):
    torch.save({"x": Payload(marker)}, marker.with_suffix(".pt"))
    return marker.with_suffix(".pt").read_bytes()


@pytest.mark.parametrize("payload", [pickled, torch_saved])
def test_a_pickle_under_any_name_executes_nothing_and_is_refused(checkpoints, tmp_path, payload):
    good, bad = list_checkpoints(checkpoints)[-2:]
    marker = tmp_path / "executed"
    content = payload(marker)
    with contextlib.suppress(pickle.UnpicklingError):
        pickle.loads(content)
    assert payload is torch_saved or marker.exists()
    marker.exists() and marker.rmdir()
    for file in FILES:
        kept = {other: (bad / other).read_bytes() for other in FILES}
        (bad / file).write_bytes(content)
        if file != "MANIFEST.json":
            reseal(bad)
        assert verify_checkpoint(bad), file
        assert newest_valid_checkpoint(checkpoints)[0] == good
        for read in (load_weights, load_logits):
            with contextlib.suppress(UserError):
                read(bad)
        assert not marker.exists()
        for other, before in kept.items():
            (bad / other).write_bytes(before)
    assert verify_checkpoint(bad) == []


def hostile_indices(index):
    """Name -> an index.json that must be refused, whatever its digest says."""
    (entries,) = index["fragments"].values()
    (kind, parameter, _, length), *rest = entries
    shapes = index["shapes"]
    huge = {**shapes, parameter: [10**12]}
    yield "a file outside", {**index, "fragments": {"../../outside.safetensors": entries}}
    yield "an absolute file", {**index, "fragments": {"/etc/passwd": entries}}
    yield "a hidden file", {**index, "fragments": {".secret": entries}}
    yield "a huge shape", {**index, "shapes": huge}
    yield "a huge piece", {**index, "shapes": huge, "fragments": {FILES[3]: [(kind, parameter, 0, 10**12), *rest]}}
    yield "a number beyond all", {**index, "shapes": {**shapes, parameter: [10**400]}}
    yield "a negative start", {**index, "fragments": {FILES[3]: [(kind, parameter, -1, length), *rest]}}
    yield "a hole", {**index, "fragments": {FILES[3]: rest}}
    yield "a piece twice", {**index, "fragments": {FILES[3]: [*entries, entries[0]]}}
    yield "no parameters", {**index, "shapes": {}, "fragments": {}}
    yield "another key", {**index, "pickle": "cos\nsystem\n"}
    yield "text for a number", {**index, "fragments": {FILES[3]: [(kind, parameter, "0", length), *rest]}}


def test_an_index_that_lies_is_refused_before_anything_is_allocated(checkpoints):
    path = list_checkpoints(checkpoints)[-1]
    for name, index in hostile_indices(json.loads((path / "index.json").read_bytes())):
        (path / "index.json").write_text(json.dumps(index))
        reseal(path)
        assert verify_checkpoint(path), name
        with pytest.raises(UserError, match="cannot be read"):
            load_weights(path)


def test_hostile_json_is_refused(checkpoints):
    path = list_checkpoints(checkpoints)[-1]
    state = json.loads((path / "state.json").read_bytes())
    stream = state["stream"]
    bad_states = [
        "[" * 200_000,
        "null",
        json.dumps({**state, "step": -1}),
        json.dumps({**state, "step": 10**30}),
        json.dumps({**state, "tokens_seen": "0"}),
        json.dumps({**state, "step": state["step"] + 1}),
        json.dumps({**state, "__class__": "os.system"}),
        json.dumps({**state, "stream": {**stream, "visits": stream["visits"][:-1]}}),
        json.dumps({**state, "stream": {**stream, "visits": [10**30] * len(stream["visits"])}}),
        json.dumps({**state, "stream": {**stream, "lost": [-1] * len(stream["lost"])}}),
    ]
    for text in bad_states:
        (path / "state.json").write_text(text)
        reseal(path)
        assert verify_checkpoint(path), text[:100]
    entry = {"bytes": 1, "sha256": "0" * 64}
    for name in ("../../outside", "/etc/passwd", "a/b", ".", "..", ""):
        manifest = CheckpointManifest.model_construct(format=2, step=step_of(path), files={name: FileEntry(**entry)})
        (path / "MANIFEST.json").write_bytes(manifest.sealed())
        assert "MANIFEST.json is damaged" in verify_checkpoint(path)[0], name
    for text in ("[" * 200_000, "{}", '{"sha256": 1}', "\x00" * 100):
        (path / "MANIFEST.json").write_text(text)
        assert "MANIFEST.json is damaged" in verify_checkpoint(path)[0]


def test_tensors_of_another_kind_than_the_index_says_are_refused(checkpoints):
    path = list_checkpoints(checkpoints)[-1]
    tensors = load_file(path / FILES[3])
    for change in (torch.Tensor.double, lambda tensor: tensor[None]):
        save_file({name: change(tensor) for name, tensor in tensors.items()}, path / FILES[3])
        reseal(path)
        assert verify_checkpoint(path) == ["rank-00000.safetensors does not hold what index.json says"]


def test_an_older_format_says_so(checkpoints):
    path = list_checkpoints(checkpoints)[-1]
    old = read_manifest(path).model_copy(update={"format": 1})
    (path / "MANIFEST.json").write_bytes(old.sealed())
    assert verify_checkpoint(path) == ["MANIFEST.json is of format 1, and this version reads format 2"]


# --------------------------------------------------------------------------------------------- keeping and removing


def make_checkpoints(folder, *steps):
    for step in steps:
        (folder / f"step-{step:08d}").mkdir(parents=True)
        (folder / f"step-{step:08d}" / "MANIFEST.json").write_text("{}")


def steps_in(folder):
    return [step_of(path) for path in list_checkpoints(folder)]


def test_the_last_checkpoints_and_every_nth_are_kept(tmp_path):
    make_checkpoints(tmp_path, *range(1, 9))
    prune_checkpoints(tmp_path, keep_last=2, keep_every=3)
    assert steps_in(tmp_path) == [3, 6, 7, 8]
    assert list(tmp_path.glob(".*")) == []


def test_damaged_checkpoints_neither_count_nor_go(tmp_path):
    make_checkpoints(tmp_path, 700, 800, 850, 900, 950)
    prune_checkpoints(tmp_path, keep_last=2, keep_every=0, damaged={"step-00000900", "step-00000950"})
    assert steps_in(tmp_path) == [800, 850, 900, 950]


def test_a_removal_takes_the_name_first_and_the_manifest_next(tmp_path, monkeypatch):
    make_checkpoints(tmp_path, 5)
    (tmp_path / "step-00000005" / "rank-00000.safetensors").write_bytes(b"x")
    seen = []

    def killed(folder):
        seen.append([sorted(file.name for file in folder.iterdir()), steps_in(tmp_path)])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(tmp_path / "step-00000005")
    assert seen == [[["rank-00000.safetensors"], []]]
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_names_are_no_checkpoints(tmp_path):
    for name in ("step-1", "step-0000000x", "step-00000001.old", ".step-00000002.ab.tmp", "step-" + "9" * 40):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000003").write_text("a file")
    make_checkpoints(tmp_path, 100_000_000, 7, 99_999_999)
    assert steps_in(tmp_path) == [7, 99_999_999, 100_000_000]


def test_a_save_of_the_same_step_replaces_a_damaged_one_and_no_kill_loses_the_old_one(tmp_path, monkeypatch):
    target, new = tmp_path / "step-00000005", tmp_path / ".step-00000005.ab.tmp"
    for folder, text in ((target, "old"), (new, "new")):
        folder.mkdir()
        (folder / "MANIFEST.json").write_text(text)
    rename = type(new).rename

    def killed(path, to):
        if path == new:
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(type(new), "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(new, target)
    assert steps_in(tmp_path) == []
    remove_leftovers(tmp_path)
    assert [(path.name, (path / "MANIFEST.json").read_text()) for path in tmp_path.iterdir()] == [(target.name, "old")]

    new.mkdir()
    (new / "MANIFEST.json").write_text("new")
    publish(new, target)
    assert [(path.name, (path / "MANIFEST.json").read_text()) for path in tmp_path.iterdir()] == [(target.name, "new")]
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "gone", target)
    assert (target / "MANIFEST.json").read_text() == "new"
