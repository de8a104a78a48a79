"""Damaged and hostile shards: seen before a wrong token is read, skipped alike on all ranks, and never executed."""

import io
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import get_worker_info

from pretrain.config.parallel import SOLE_READER, DataRank
from pretrain.data.build.joining import merge_corpora
from pretrain.data.manifest import ShardEntry, load_manifest
from pretrain.data.shards import verified
from pretrain.data.shards.shard import Shard, index_shard
from pretrain.data.shards.verified import VerifiedShards
from pretrain.data.stream.loader import training_steps, validation_batches
from pretrain.data.stream.packing import PackingRule
from pretrain.data.stream.reader import RowSource
from pretrain.data.stream.state import StreamState
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from pretrain.training.collectives import any_rank
from tests.data.stream.test_stream import first_steps, merged, rows_of
from tests.ranks import run_on_ranks, trainer_of


def flip(content: bytearray, at: int) -> bytearray:
    content[at] ^= 1
    return content


def members_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def damage(path: Path, kind: str) -> None:
    """One of the seven kinds, to the middle of a shard."""
    content, members = bytearray(path.read_bytes()), members_of(path)
    member = members[len(members) // 2]
    assert member.size > 20
    if kind == "flip in a header":
        content = flip(content, member.offset + 124)
    elif kind == "flip in a payload":
        content = flip(content, member.offset_data + 19)
    elif kind == "cut at an entry's end":
        content = content[: member.offset]
    elif kind == "cut between two members of a sample":
        first = next(m for m, after in pairwise(members) if m.name[:-5] == after.name[:-4])
        content = content[: first.offset_data + -(-first.size // 512) * 512]
    elif kind == "cut inside a header":
        content = content[: member.offset + 100]
    elif kind == "cut inside a payload":
        content = content[: member.offset_data + 10]
    elif kind == "zeroed page":
        page = member.offset_data // 4096 * 4096
        content[page : page + 4096] = bytes(len(content[page : page + 4096]))
    elif kind == "missing":
        path.unlink()
        return
    assert content != path.read_bytes()
    path.write_bytes(content)


KINDS = (
    "flip in a header", "flip in a payload", "cut at an entry's end", "cut between two members of a sample",
    "cut inside a header", "cut inside a payload", "zeroed page", "missing",
)  # fmt: skip


@pytest.fixture
def copy(corpus_values, tmp_path):
    """A copy of the corpus to damage."""
    folder = tmp_path / "copy"
    shutil.copytree(corpus_values["path"], folder)
    return folder


def config_of(make_config, copy, name="run", **sections):
    return make_config(name, corpus={"path": str(copy), "sources": []}, **sections)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage_stops_the_run_with_the_shards_name_or_is_skipped_and_counted(
    make_config, copy, kind, caplog
):
    manifest = load_manifest(copy)
    entry = manifest.splits["train"].shards[3]
    list(islice(training_steps(config_of(make_config, copy), manifest, StreamState.start(16), SOLE_READER), 1))
    damage(copy / entry.path, kind)
    with pytest.raises(UserError, match=rf"{Path(entry.path).name}.*on_corrupt=skip"):
        next(training_steps(config_of(make_config, copy), manifest, StreamState.start(16), SOLE_READER))
    skipping = config_of(make_config, copy, data={"on_corrupt": "skip"})
    with caplog.at_level(logging.WARNING):
        step = next(training_steps(skipping, manifest, StreamState.start(16), SOLE_READER))
    assert step.state.lost.sum() == entry.samples
    assert f"{entry.samples} samples skipped" in caplog.text
    assert Path(entry.path).name in caplog.text


def test_a_worker_that_meets_a_damaged_shard_ends_the_run_with_the_answer_and_no_traceback(make_config, copy):
    manifest = load_manifest(copy)
    damage(copy / manifest.splits["train"].shards[3].path, "missing")
    with pytest.raises(UserError) as caught:
        next(
            training_steps(
                config_of(make_config, copy, data={"workers": 1}), manifest, StreamState.start(16), SOLE_READER
            )
        )
    assert str(caught.value).startswith(str(copy))
    assert "Traceback" not in str(caught.value)


def test_skipping_keeps_one_order_and_one_count_on_any_ranks_workers_and_resumes(make_config, copy):
    manifest = load_manifest(copy)
    shards = manifest.splits["train"].shards
    for number, kind in ((2, "zeroed page"), (3, "missing"), (9, "cut inside a payload")):
        damage(copy / shards[number].path, kind)
    data = {"on_corrupt": "skip", "packing": "packed"}
    config = config_of(make_config, copy, data=data)
    steps = first_steps(config, manifest, 60)
    expected, lost = rows_of(steps), int(steps[0][-1].state.lost.sum())
    assert lost > sum(shards[n].samples for n in (2, 3, 9)), "some are passed over in the second epoch as well"
    for world_size, workers in ((2, 0), (4, 1), (1, 3)):
        other = config_of(make_config, copy, data={**data, "workers": workers})
        parts = first_steps(other, manifest, 60, world_size)
        assert rows_of(parts) == expected, (world_size, workers)
        assert merged([rank[-1].state for rank in parts]).lost.sum() == lost
    first = first_steps(config, manifest, 25, 2)
    state = merged([rank[-1].state for rank in first])
    rest = first_steps(config, manifest, 35, 4, [state] * 4)
    assert rows_of(first) + rows_of(rest) == expected
    assert merged([rank[-1].state for rank in rest]).lost.sum() == lost


def test_a_shard_damaged_in_the_middle_of_its_visit_loses_only_what_was_not_read(make_config, copy):
    manifest = load_manifest(copy)
    config = config_of(make_config, copy, data={"on_corrupt": "skip"})
    source = RowSource(copy, manifest, "train", config.seed, [PackingRule(32)])
    plan = source.open(0)[1]
    state = StreamState.start(16)
    state.rows[0, 0] = len(plan) - 4
    damage(copy / source.entry(0).path, "flip in a payload")
    step = next(training_steps(config, manifest, state, SOLE_READER))
    unread = len(set(plan.samples[-4:].tolist()))
    assert step.state.lost[0] == unread
    assert step.state.lost.sum() == unread
    (copy / source.entry(0).index_path).unlink()
    step = next(training_steps(config, manifest, state, SOLE_READER))
    assert step.state.lost.sum() == source.entry(0).samples > unread > 0


def test_when_every_shard_is_damaged_the_run_ends_instead_of_looking_for_ever(make_config, copy):
    manifest = load_manifest(copy)
    for entry in manifest.splits["train"].shards:
        (copy / entry.path).unlink()
    config = config_of(make_config, copy, data={"on_corrupt": "skip"})
    with pytest.raises(UserError, match="none of the shards that are left has a row"):
        next(training_steps(config, manifest, StreamState.start(16), SOLE_READER))


def test_a_validation_shard_that_is_damaged_on_one_node_is_left_out_on_all(make_config, copy, corpus_values, tmp_path):
    whole, entry = Path(corpus_values["path"]), load_manifest(copy).splits["valid"].shards[0]
    more = tmp_path / "more"
    merge_corpora(more, [whole, whole])
    manifest = load_manifest(more)
    shutil.copytree(more, tmp_path / "other node")
    damage(tmp_path / "other node" / manifest.splits["valid"].shards[-1].path, "flip in a payload")
    settings = {"data": {"on_corrupt": "skip"}, "training": {"validation_rows": 10_000}}
    configs = [config_of(make_config, folder, **settings) for folder in (more, tmp_path / "other node")]
    batches = run_on_ranks(validation_rows, 2, tmp_path / "ranks", configs, manifest)
    alone = list(validation_batches(config_of(make_config, whole, **settings), load_manifest(whole), SOLE_READER, 8))
    assert entry.samples > 10
    assert len(batches[0]) == len(batches[1]) > 2
    assert sum(map(rows_in, batches[0] + batches[1])) == sum(map(rows_in, alone))


def rows_in(batch):
    return int((batch.document_ids[:, 0] > 0).sum())


def validation_rows(rank, configs, manifest):
    return list(validation_batches(configs[rank], manifest, DataRank(rank, 2), 8, any_rank))


def test_workers_that_disagree_about_a_shard_end_the_run(make_config, copy, monkeypatch):
    """One worker finds a shard damaged that the other has read: the file was changed in between."""
    manifest = load_manifest(copy)
    open_shard = RowSource.try_open

    def damaged_for_worker_0(source, dealt, rows=()):
        info = get_worker_info()
        return None if info and info.id == 0 and dealt == 3 else open_shard(source, dealt, rows)

    monkeypatch.setattr(RowSource, "try_open", damaged_for_worker_0)
    config = config_of(make_config, copy, data={"on_corrupt": "skip", "workers": 2})
    with pytest.raises(UserError, match="damaged for one loader worker and whole for another.*it resumes"):
        list(islice(training_steps(config, manifest, StreamState.start(16), SOLE_READER), 4))


def test_a_shard_that_is_whole_again_after_a_resume_is_read_from_its_next_visit(make_config, copy):
    manifest = load_manifest(copy)
    path = copy / manifest.splits["train"].shards[3].path
    content = path.read_bytes()
    damage(path, "flip in a payload")
    config = config_of(make_config, copy, data={"on_corrupt": "skip"})
    state = first_steps(config, manifest, 5)[0][-1].state
    path.write_bytes(content)
    rest = first_steps(config, manifest, 60, 2, [state] * 2)
    whole = first_steps(
        config_of(make_config, copy, data={"on_corrupt": "skip", "workers": 3}), manifest, 60, 1, [state]
    )
    assert rows_of(rest) == rows_of(whole)
    assert (
        merged([rank[-1].state for rank in rest]).lost.sum()
        == state.lost.sum()
        == manifest.splits["train"].shards[3].samples
    )


def train(rank, config, world_size):
    return trainer_of(config, rank, world_size).fit()


@pytest.mark.slow
def test_training_on_two_ranks_goes_on_without_a_damaged_shard_and_says_what_was_lost(make_config, copy, tmp_path):
    manifest = load_manifest(copy)
    entry = manifest.splits["train"].shards[5]
    damage(copy / entry.path, "flip in a header")
    config = config_of(make_config, copy, data={"on_corrupt": "skip"}, training={"tokens": 3_000})
    open_run_folder(config, manifest)
    assert run_on_ranks(train, 2, tmp_path / "ranks", config, 2) == [0, 0]
    records = [r for r in RunFolder(config.run_folder).metrics() if "loss" in r]
    assert records[-1]["samples_lost"] == entry.samples
    status = (config.run_folder / "status.json").read_text()
    assert f"{entry.samples} samples of damaged shards skipped" in status


# ------------------------------------------------------------------------------------------- checked once per node


@pytest.fixture
def digests(monkeypatch):
    """Counts how often a shard is hashed."""
    counted = []
    original = verified.verify_shard
    monkeypatch.setattr(verified, "verify_shard", lambda *arguments: counted.append(1) or original(*arguments))
    return counted


def test_a_shard_is_hashed_once_per_node_and_again_only_when_any_of_it_changed(copy, tmp_path, digests):
    entry = load_manifest(copy).splits["train"].shards[0]
    path = copy / entry.path
    for _ in range(3):
        assert VerifiedShards(tmp_path / "cache").problem(copy, entry) is None
    assert len(digests) == 1
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(flip(bytearray(content), len(content) // 2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_size == before.st_size
    for _ in range(2):
        assert "damaged" in VerifiedShards(tmp_path / "cache").problem(copy, entry)
    assert len(digests) == 3
    path.write_bytes(content)
    assert VerifiedShards(tmp_path / "cache").problem(copy, entry) is None
    other = entry.model_copy(update={"sha256": "0" * 64})
    assert "damaged" in VerifiedShards(tmp_path / "cache").problem(copy, other)
    (copy / entry.index_path).write_bytes(b"x")
    assert "index" in VerifiedShards(tmp_path / "cache").problem(copy, entry)
    (copy / entry.index_path).unlink()
    assert "missing" in VerifiedShards(tmp_path / "cache").problem(copy, entry)


def test_a_whole_shard_that_is_read_in_the_place_of_a_damaged_one_does_not_vouch_for_it(copy, tmp_path, monkeypatch):
    entry, original = load_manifest(copy).splits["train"].shards[0], verified.verify_shard
    shutil.copytree(copy, tmp_path / "whole")
    damage(copy / entry.path, "flip in a payload")

    def swap_and_hash(*arguments):
        copy.rename(tmp_path / "damaged")
        (tmp_path / "whole").rename(copy)
        return original(*arguments)

    monkeypatch.setattr(verified, "verify_shard", swap_and_hash)
    assert VerifiedShards(tmp_path / "cache").problem(copy, entry) is None
    monkeypatch.undo()
    copy.rename(tmp_path / "whole")
    (tmp_path / "damaged").rename(copy)
    assert "damaged" in VerifiedShards(tmp_path / "cache").problem(copy, entry)


def test_a_cache_that_cannot_be_written_only_costs_time(copy, tmp_path, digests):
    (tmp_path / "file").write_text("")
    shards = VerifiedShards(tmp_path / "file")
    entry = load_manifest(copy).splits["train"].shards[0]
    assert shards.problem(copy, entry) is None
    assert shards.problem(copy, entry) is None
    assert len(digests) == 2


# ------------------------------------------------------------------------------------------------- hostile archives


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['HOSTILE_MARK']}",)


def npy(array, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def add(tar, name, content=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, target
    tar.addfile(info, io.BytesIO(content))


def hostile_tar(path: Path) -> None:
    """Everything that an unpacker could trip over, around one honest member."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "../escaped.txt", b"x")
        add(tar, "/tmp/absolute-escaped.txt", b"x")
        add(tar, "link.npy", kind=tarfile.SYMTYPE, target="/etc/passwd")
        add(tar, "hard.npy", kind=tarfile.LNKTYPE, target="../../etc/passwd")
        add(tar, "device.npy", kind=tarfile.CHRTYPE)
        add(tar, "fifo.npy", kind=tarfile.FIFOTYPE)
        add(tar, "a.pkl", pickle.dumps(Payload()))
        add(tar, "a.pickle", pickle.dumps(Payload()))
        add(tar, "a.pyd", pickle.dumps(Payload()))
        add(tar, "pipe:touch $HOSTILE_MARK.npy", npy(np.arange(3, dtype=np.uint16)))
        add(tar, "x" * 300 + ".npy", npy(np.arange(5, dtype=np.uint16)))


def test_hostile_members_are_not_executed_extracted_or_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "executed"))
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    path = tmp_path / "inside" / "shard.tar"
    hostile_tar(path)
    assert index_shard(path)[:, 1].tolist() == [3, 5]
    assert [p.name for p in tmp_path.rglob("*")] == ["inside", "shard.tar"]


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.array([Payload()], dtype=object), "object"),
        (np.zeros((2, 2), np.uint16), "expected one row"),
        (np.zeros(3, np.float32), "expected one row"),
    ],
)
def test_an_npy_that_is_a_pickle_or_no_row_of_ids_is_refused(tmp_path, monkeypatch, array, complaint):
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "executed"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.npy", npy(array, allow_pickle=True))
    with pytest.raises(UserError, match=complaint):
        index_shard(tmp_path / "a.tar")
    assert not (tmp_path / "executed").exists()


def test_a_giant_header_is_refused_before_it_is_read(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**40
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 2**33)
    with pytest.raises(UserError, match="a header of 1,099,511,627,776 bytes"):
        index_shard(path)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("missing", "flip in a payload")])
def test_foreign_archives_are_checked_as_far_as_a_tar_can_be(copy, kind):
    path = copy / load_manifest(copy).splits["train"].shards[0].path
    damage(path, kind)
    with pytest.raises(UserError, match="damaged|cut off|bytes at byte|not a .npy"):
        index_shard(path)


@pytest.mark.parametrize("path", ["../../etc/passwd.tar", "/etc/passwd.tar", "train/../../x.tar", "train/a/b.tar"])
def test_a_manifest_cannot_name_a_file_outside_its_corpus(path):
    with pytest.raises(ValueError, match="pattern"):
        ShardEntry(path=path, bytes=1, sha256="0" * 64, index_sha256="0" * 64, samples=1, tokens=1)


def test_an_index_that_points_outside_its_shard_is_refused(copy):
    entry = load_manifest(copy).splits["train"].shards[0]
    index = np.load(copy / entry.index_path)
    for column, value in ((0, -8), (0, 2**40), (1, -1), (1, 2**40), (0, 1)):
        wrong = index.copy()
        wrong[0, column] = value
        np.save(copy / entry.index_path, wrong)
        with pytest.raises(UserError, match="points outside"):
            Shard(copy, entry, "uint16", lambda *_: None)


LEFT_ALIVE = """
from torch.utils.data import DataLoader, IterableDataset
from pretrain.data.stream.loader import _begin_worker

class Forever(IterableDataset):
    def __iter__(self):
        while True:
            yield 1

steps = iter(DataLoader(Forever(), batch_size=None, num_workers=1, worker_init_fn=_begin_worker))
next(steps)
cycle = [steps]
cycle.append(cycle)  # as an exception and its frames may be one
del steps
"""


def test_a_program_ends_although_a_worker_is_left_that_ignores_signals():
    root = Path(__file__).parents[3]
    ended = subprocess.run([sys.executable, "-c", LEFT_ALIVE], cwd=root, timeout=60, check=False)
    assert ended.returncode == 0
