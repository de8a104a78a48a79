"""Corpora of tars of others, and of several corpora: trained on like any other."""

import io
import json
import shutil
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from launch.cli import app
from pretrain.config.parallel import SOLE_READER
from pretrain.data.build.corpus import build_corpus
from pretrain.data.build.foreign import index_shards
from pretrain.data.build.joining import merge_corpora
from pretrain.data.inspection import describe_corpus, verify_corpus
from pretrain.data.manifest import load_manifest
from pretrain.data.shards.shard import Shard
from pretrain.data.stream.loader import training_steps
from pretrain.data.stream.state import StreamState
from pretrain.data.tokenizer import BOS, EOS
from pretrain.errors import UserError
from tests.data.shards.test_damage import hostile_tar
from tests.data.stream.test_stream import first_steps, rows_of


def foreign_tar(path: Path, arrays) -> Path:
    """As somebody else's script writes it: other names, other members."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, array in enumerate(arrays):
            stream = io.BytesIO()
            np.save(stream, array)
            for kind, content in (("json", b"{}"), ("npy", stream.getvalue())):
                info = tarfile.TarInfo(f"their/doc{number}.{kind}")
                info.size, info.mtime = len(content), 1234.5
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def model(corpus_values) -> Path:
    return Path(corpus_values["path"]) / "tokenizer.model"


@pytest.mark.parametrize("dtype", ["int64", "uint16"])
def test_tars_of_others_are_trained_on_like_a_corpus(make_config, tmp_path, model, dtype):
    random = np.random.default_rng(0)
    documents = [random.integers(5, 100, random.integers(1, 90)).astype(dtype) for _ in range(60)]
    framed = [np.concatenate(([BOS], d, [EOS])).astype(dtype) if n % 2 else d for n, d in enumerate(documents)]
    tars = [foreign_tar(tmp_path / f"their.{n}.tar", framed[n * 10 : n * 10 + 10]) for n in range(6)]
    before = [tar.read_bytes() for tar in tars]
    corpus = tmp_path / "corpus"
    manifest = index_shards(corpus, {"train": tars[:4], "valid": tars[4:5], "test": tars[5:]}, model, "theirs")
    assert [tar.read_bytes() for tar in tars] == before
    assert verify_corpus(corpus) == []
    assert describe_corpus(corpus).manifest == manifest == load_manifest(corpus)
    assert manifest.splits["train"].tokens == sum(map(len, documents[:40]))
    shard = Shard(corpus, manifest.splits["train"].shards[1], manifest.token_dtype)
    for number in range(10):
        assert shard.tokens(number, 0, int(shard.lengths[number])).tolist() == documents[10 + number].tolist()
    config = make_config(corpus={"path": str(corpus), "sources": []}, data={"streams": 4, "packing": "packed"})
    assert rows_of(first_steps(config, manifest, 5)) == rows_of(first_steps(config, manifest, 5, 4))


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.array([5, 119, 120]), "outside the 120 of the tokenizer"),
        (np.array([5, -1]), "outside"),
        (np.array([5, EOS, 6]), "begin or end symbols inside"),
        (np.array([0.5]), "expected one row of token ids"),
    ],
)
def test_ids_that_are_not_of_the_tokenizer_are_refused(tmp_path, model, array, complaint):
    tar = foreign_tar(tmp_path / "a.tar", [array])
    with pytest.raises(UserError, match=complaint):
        index_shards(tmp_path / "corpus", {"train": [tar]}, model, "theirs")
    assert not (tmp_path / "corpus/manifest.json").exists()


def test_tars_of_text_and_hostile_tars_and_folders_in_use_are_answered(tmp_path, model, monkeypatch):
    with tarfile.open(tmp_path / "text.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    with pytest.raises(UserError, match=r"no .npy members .*has .txt.*data build"):
        index_shards(tmp_path / "c", {"train": [tmp_path / "text.tar"]}, model, "theirs")
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "executed"))
    hostile_tar(tmp_path / "hostile.tar")
    with pytest.raises(UserError, match="padding"):
        index_shards(tmp_path / "d", {"train": [tmp_path / "hostile.tar"]}, model, "theirs")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "escaped.txt").exists()
    with pytest.raises(UserError, match="is a corpus already"):
        index_shards(model.parent, {"train": []}, model, "theirs")


def test_merged_corpora_hold_all_documents_and_keep_their_sources(make_config, manifest, corpus_values, tmp_path):
    first = Path(corpus_values["path"])
    lines = "".join(json.dumps({"text": f"{word} " * 40}) + "\n" for word in ("ba", "de", "gi", "lo", "mu", "ka"))
    (tmp_path / "more.jsonl").write_text(lines)
    values = {
        **corpus_values,
        "path": str(tmp_path / "more"),
        "sources": [{"path": str(tmp_path / "more.jsonl")}],
        "tokenizer": {"model": str(first / "tokenizer.model")},
        "min_train_shards": 2,
        "splits": {"valid": 0, "test": 0},
    }
    config = make_config(corpus=values, data={"streams": 2})
    build_corpus(config.corpus)
    with pytest.raises(UserError, match="different split rules"):
        merge_corpora(tmp_path / "all", [first, tmp_path / "more"])
    again = tmp_path / "again"
    shutil.copytree(first, again)
    merged = merge_corpora(tmp_path / "all", [first, again])
    assert verify_corpus(tmp_path / "all") == []
    train = merged.splits["train"]
    assert train.tokens == 2 * manifest.splits["train"].tokens
    assert len({shard.path for shard in train.shards}) == 32
    sources = [np.load(tmp_path / "all" / shard.index_path)[:, 2] for shard in train.shards]
    assert [set(s.tolist()) for s in sources] == [{0}] * 16 + [{1}] * 16
    assert (tmp_path / "all" / train.shards[0].path).stat().st_nlink > 1
    run = make_config(corpus={"path": str(tmp_path / "all"), "sources": []})
    assert len(list(islice(training_steps(run, merged, StreamState.start(16), SOLE_READER), 3))) == 3


def test_the_commands_print_what_they_made(tmp_path, model):
    tars = [str(foreign_tar(tmp_path / f"{n}.tar", [np.arange(5, 50)])) for n in range(3)]
    arguments = ["data", "index", str(tmp_path / "c"), *tars[:2], "--tokenizer", str(model), "--valid", tars[2]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "train" in result.output
    result = CliRunner().invoke(app, ["data", "merge", str(tmp_path / "d"), str(tmp_path / "c"), str(tmp_path / "c")])
    assert result.exit_code == 0, result.output
    assert load_manifest(tmp_path / "d").splits["train"].tokens == 180
