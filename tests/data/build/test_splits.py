"""Splits by given sources, metadata that is kept with documents, and the hash of the tokenizer's sample."""

import hashlib
import json
from collections import Counter
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pretrain.config.data import CorpusConfig
from pretrain.data.build.corpus import build_corpus
from pretrain.data.inspection import verify_corpus
from pretrain.data.manifest import MANIFEST, TOKENIZER, load_manifest
from pretrain.data.shards.shard import Shard
from pretrain.data.sources.inputs import find_inputs
from pretrain.data.sources.reading import read_documents
from pretrain.data.tokenizer import Tokenizer, train_tokenizer
from pretrain.errors import UserError
from tests.conftest import generated_text

TEXTS = [generated_text(number, 30) for number in range(40)]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def corpus_of(tmp_path, sources, **settings):
    values = {"path": str(tmp_path / "c"), "sources": sources, "tokenizer": {"vocab_size": 60, "byte_fallback": False}}
    values |= {"splits": {"valid": 0, "test": 0}, "min_train_shards": 2, "processes": 1, **settings}
    return CorpusConfig.model_validate(values)


def texts_of(path, split):
    manifest, tokenizer = load_manifest(path), Tokenizer(path / TOKENIZER)
    shards = [Shard(path, entry, manifest.token_dtype) for entry in manifest.splits[split].shards]
    return [tokenizer.decode(shard.tokens(i, 0, int(n))) for shard in shards for i, n in enumerate(shard.lengths)]


def test_given_sources_are_a_split_and_what_they_hold_is_nowhere_else(tmp_path):
    def source(name, texts, split):
        path = jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
        return {"path": path, "name": name, "split": split}

    sources = [
        source("mixed", TEXTS[:30], None),
        source("train", TEXTS[25:34], "train"),
        source("held out", [*TEXTS[10:14], TEXTS[35], TEXTS[31].replace(" ", "  ")], "valid"),
        source("last", [TEXTS[36], TEXTS[35]], "test"),
    ]
    manifest = build_corpus(corpus_of(tmp_path, sources, splits={"valid": 0.5, "test": 0.5 - 1e-9}))
    path = tmp_path / "c"
    assert sorted(texts_of(path, "test")) == sorted([TEXTS[36], TEXTS[35]])
    assert sorted(texts_of(path, "valid")) == sorted([*TEXTS[10:14], TEXTS[31].replace(" ", "  ")])
    expected = [t for t in [*TEXTS[:30], *TEXTS[25:34]] if t not in [*TEXTS[10:14], TEXTS[31]]]
    assert sorted(texts_of(path, "train")) == sorted(expected)
    skipped = {entry.name: entry.skipped for entry in manifest.sources}
    assert skipped == {
        "last": {}, "held out": {"also in test": 1}, "mixed": {"also in valid": 4}, "train": {"also in valid": 1},
    }  # fmt: skip
    assert manifest.split_rule.hash.endswith("given: last to test, held out to valid, train to train")
    assert verify_corpus(path) == []
    gone = [sources[0], {**source("gone", [TEXTS[36]], "valid")}, sources[3]]
    with pytest.raises(UserError, match="no document of the sources given to valid is left"):
        build_corpus(corpus_of(tmp_path, gone, path=str(tmp_path / "d")))


def test_what_hashing_holds_out_is_taken_out_of_a_source_given_to_train(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    sources = [{"path": path, "name": "given", "split": "train"}, {"path": path, "name": "hashed"}]
    build_corpus(corpus_of(tmp_path, sources, splits={"valid": 0.3, "test": 0}))
    valid, train = texts_of(tmp_path / "c", "valid"), texts_of(tmp_path / "c", "train")
    assert len(valid) > 3
    assert not set(valid) & set(train)
    assert set(Counter(train).values()) == {2}


def test_metadata_fields_are_kept_with_each_document(tmp_path):
    records = [{"text": text, "id": n, "year": 1900 + n, "tags": ["a", {"b": n}]} for n, text in enumerate(TEXTS)]
    del records[3]["tags"], records[3]["year"]
    source = {"path": jsonl(tmp_path / "a.jsonl", records), "metadata_fields": ["tags", "year"]}
    manifest = build_corpus(corpus_of(tmp_path, [source]))
    urls = [str(tmp_path / "c" / shard.path) for shard in manifest.splits["train"].shards]
    found = {sample["json"]["id"]: sample["json"] for sample in wds.WebDataset(urls, shardshuffle=False).decode()}
    assert found["7"]["metadata"] == {"tags": ["a", {"b": 7}], "year": 1907}
    assert "metadata" not in found["3"]


def test_parquet_metadata_is_written_as_json_and_a_column_that_is_not_there_is_named(tmp_path):
    table = pa.table({"text": TEXTS[:2], "day": [date(2020, 1, 2), None], "n": np.arange(2)})
    pq.write_table(table, tmp_path / "a.parquet")

    def documents(*fields):
        config = corpus_of(tmp_path, [{"path": str(tmp_path / "a.parquet"), "metadata_fields": fields}]).sources[0]
        return list(read_documents(config, find_inputs(config), "error", Counter()))

    assert [d.metadata for d in documents("n", "day")] == [{"n": 0, "day": "2020-01-02"}, {"n": 1, "day": None}]
    assert [d.text for d in documents("text", "n")] == TEXTS[:2]
    with pytest.raises(UserError, match="has no column 'nn'; its columns: 'text', 'day', 'n'"):
        documents("nn")


def test_the_manifest_has_the_hash_of_the_tokenizers_sample_also_after_a_kill(tmp_path, monkeypatch):
    source = {"path": jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])}
    given = []
    monkeypatch.setattr(
        "pretrain.data.build.corpus.train_tokenizer",
        lambda texts, *rest: train_tokenizer((given.append(text) or text for text in texts), *rest),
    )

    def stop(stage, done, total, documents):
        if stage == "encoding" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(corpus_of(tmp_path, [source]), stop)
    manifest = build_corpus(corpus_of(tmp_path, [source]))
    assert sorted(given) == sorted(TEXTS), "trained once, before the stop"
    sample = b"".join(len(text.encode()).to_bytes(8, "little") + text.encode() for text in given)
    assert manifest.tokenizer.sample_sha256 == hashlib.sha256(sample).hexdigest()
    model = {"model": str(tmp_path / "c" / TOKENIZER)}
    assert build_corpus(corpus_of(tmp_path / "x", [source], tokenizer=model)).tokenizer.sample_sha256 is None


def test_a_manifest_from_before_there_was_a_sample_hash_is_still_read(tmp_path):
    source = {"path": jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])}
    manifest = build_corpus(corpus_of(tmp_path, [source]))
    before = manifest.model_copy(update={"tokenizer": manifest.tokenizer.model_copy(update={"sample_sha256": None})})
    content = before.model_dump(mode="json") | {"fingerprint": before.computed_fingerprint()}
    del content["tokenizer"]["sample_sha256"]
    unsealed = {name: value for name, value in content.items() if name != "fingerprint"}
    canonical = json.dumps(unsealed, sort_keys=True).encode()
    assert content["fingerprint"] == hashlib.sha256(canonical).hexdigest()
    (tmp_path / "c" / MANIFEST).write_text(json.dumps(content))
    assert load_manifest(tmp_path / "c").fingerprint == content["fingerprint"]
