"""Corpora that are built in parts, and joined."""

from pathlib import Path

import pytest

from pretrain.config.data import CorpusConfig
from pretrain.data.build.parts import build_part, join_parts, part_path
from pretrain.data.inspection import verify_corpus
from pretrain.data.manifest import SPLITS, Manifest, load_manifest
from pretrain.data.shards.shard import Shard
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from tests.conftest import generated_text


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    """Two sources, of 60 files and of one."""
    (tmp_path / "raw").mkdir()
    for number in range(60):
        (tmp_path / "raw" / f"{number:02d}.txt").write_text(generated_text(number, 200))
    (tmp_path / "one.jsonl").write_text('{"text": "ba de gi lo mu ka"}\n')
    return CorpusConfig.model_validate(
        {
            "path": tmp_path / "corpus",
            "sources": [{"path": str(tmp_path / "raw")}, {"path": str(tmp_path / "one.jsonl")}],
            "tokenizer": {"vocab_size": 64, "byte_fallback": False},
            "splits": {"valid": 0.2, "test": 0.2},
            "min_train_shards": 6,
            "processes": 1,
        }
    )


def documents(corpus: Path, manifest: Manifest) -> list[tuple[int, str]]:
    """Source and text of every document in the shards, sorted."""
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    found = []
    for split in SPLITS:
        for entry in manifest.splits[split].shards:
            shard = Shard(corpus, entry, manifest.token_dtype)
            for n, (source, length) in enumerate(zip(shard.sources, shard.lengths, strict=True)):
                found.append((int(source), tokenizer.decode(shard.tokens(n, 0, int(length)))))
    return sorted(found)


def test_parts_joined_hold_every_document_once_under_one_tokenizer_and_the_same_sources(config):
    with pytest.raises(UserError, match="part 0 trains the tokenizer of all, and is not built"):
        build_part(config, 1, 3)
    for number in range(2):
        build_part(config, number, 3)
    with pytest.raises(UserError, match="1 of 3 parts of .* are not built: 2; build them with --parts 3 --part NUMBER"):
        join_parts(config, 3)
    third = build_part(config, 2, 3)
    assert build_part(config, 2, 3) == third
    (config.path.with_name(".corpus.joining") / "left").mkdir(parents=True)
    joined = join_parts(config, 3)
    assert verify_corpus(config.path) == []
    assert load_manifest(config.path).fingerprint == joined.fingerprint
    assert [(s.name, s.files, s.documents) for s in joined.sources] == [("raw", 60, 60), ("one.jsonl", 1, 1)]
    assert len(joined.splits["train"].shards) >= config.min_train_shards
    texts = [(0, generated_text(number, 200)) for number in range(60)]
    assert documents(config.path, joined) == sorted([*texts, (1, "ba de gi lo mu ka")])


def test_what_parts_cannot_do_is_refused(config):
    with pytest.raises(UserError, match="there is no part 3 of 3: parts are 0 to 2"):
        build_part(config, 3, 3)
    proteins = config.tokenizer.model_copy(update={"kind": "protein"})
    with pytest.raises(UserError, match="corpus.sources have fewer files than 99"):
        build_part(config.model_copy(update={"tokenizer": proteins}), 98, 99)
    alone = config.filters.model_copy(update={"deduplicate": True})
    with pytest.raises(UserError, match="finds duplicates within a part only"):
        build_part(config.model_copy(update={"filters": alone}), 0, 3)
    assert not part_path(config.path, 0, 3).exists()
