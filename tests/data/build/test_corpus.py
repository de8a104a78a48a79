import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.data import CorpusConfig, SplitsConfig
from pretrain.config.load import load_config
from pretrain.data.build import groups as shard_builder
from pretrain.data.build.corpus import build_corpus
from pretrain.data.build.plan import Scan, cut_evenly, sampled_characters, split_of, text_hash
from pretrain.data.inspection import describe_corpus, verify_corpus
from pretrain.data.manifest import load_manifest
from pretrain.data.shards.shard import Shard
from pretrain.data.sources.inputs import find_inputs
from pretrain.data.sources.reading import read_documents
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError
from pretrain.files import sha256_of

SYLLABLES = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
REAL_DATA = Path(os.environ.get("DIPTYCH_DATA", Path(__file__).parents[4] / "shared/data"))
ROOT = Path(__file__).parents[3]
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no {REAL_DATA}; set DIPTYCH_DATA")


def generated_text(seed, words):
    choose = random.Random(seed)
    ends = choose.choices(["", "", ".\n"], k=words)
    return " ".join("".join(choose.choices(SYLLABLES, k=choose.randint(1, 3))) + end for end in ends)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Jsonl of 300 documents between 5 and 400 words, and a gzipped text of 20 chapters."""
    folder = tmp_path_factory.mktemp("raw")
    lengths = random.Random(1)
    with (folder / "many.jsonl").open("w") as file:
        for number in range(300):
            text = generated_text(number, int(5 * 80 ** lengths.random()))
            file.write(json.dumps({"id": f"doc.{number}", "text": text}) + "\n")
    chapters = "".join(f"CHAPTER {n}\n{generated_text(1000 + n, 300)}\n" for n in range(20))
    (folder / "book.txt.gz").write_bytes(gzip.compress(chapters.encode(), mtime=0))
    return folder


def config_for(raw, path, **settings):
    values = {
        "path": path,
        "sources": [
            {"path": str(raw / "many.jsonl")},
            {"path": str(raw / "book.txt.gz"), "separator": "^CHAPTER", "name": "book"},
        ],
        "tokenizer": {"vocab_size": 400},
        "splits": {"valid": 0.1, "test": 0.1},
        "min_train_shards": 8,
        "processes": 1,
        **settings,
    }
    return CorpusConfig.model_validate(values)


@pytest.fixture(scope="module")
def corpus(raw, tmp_path_factory):
    config = config_for(raw, tmp_path_factory.mktemp("corpora") / "corpus")
    build_corpus(config)
    return config.path


def bytes_of(folder):
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_by_split(path):
    manifest, tokenizer = load_manifest(path), Tokenizer(path / "tokenizer.model")
    found = {}
    for split, entry in manifest.splits.items():
        shards = [Shard(path, shard, manifest.token_dtype) for shard in entry.shards]
        found[split] = [
            tokenizer.decode(shard.tokens(i, 0, int(n))) for shard in shards for i, n in enumerate(shard.lengths)
        ]
    return found


# ------------------------------------------------------------------------------------------------------ the result


def test_every_document_comes_back_from_the_shards_exactly(raw, corpus):
    expected = [json.loads(line)["text"] for line in (raw / "many.jsonl").read_text().splitlines()]
    book = gzip.decompress((raw / "book.txt.gz").read_bytes()).decode()
    expected += ["CHAPTER" + chapter for chapter in book.split("CHAPTER")[1:]]
    assert sorted(text for texts in texts_by_split(corpus).values() for text in texts) == sorted(expected)


def test_the_manifest_counts_what_is_there(raw, corpus):
    manifest = load_manifest(corpus)
    by_split = texts_by_split(corpus)
    assert [(s.name, s.files, s.documents) for s in manifest.sources] == [("many.jsonl", 1, 300), ("book", 1, 20)]
    assert sum(s.characters for s in manifest.sources) == sum(s.characters for s in manifest.splits.values())
    for split, entry in manifest.splits.items():
        assert entry.documents == len(by_split[split]) == sum(shard.samples for shard in entry.shards)
        assert entry.characters == sum(map(len, by_split[split]))
        assert sum(entry.length_histogram.values()) == entry.documents
        assert entry.tokens == sum(shard.tokens for shard in entry.shards)
    assert manifest.token_dtype == "uint16"
    assert manifest.tokenizer.vocab_size == 400
    counts = np.load(corpus / "token_counts.npy")
    assert counts.dtype == np.int64
    assert counts.shape == (400,)
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    expected = np.bincount(np.concatenate([tokenizer.encode(t) for t in by_split["train"]]), minlength=400)
    np.testing.assert_array_equal(counts, expected)


def test_the_length_histogram_bins_by_powers_of_two(tmp_path):
    (tmp_path / "p.fasta").write_text("".join(f">{n}\n{'M' * n}\n" for n in (1, 2, 3, 4, 5, 64, 65)))
    config = config_for(
        tmp_path, tmp_path / "c", sources=[{"path": str(tmp_path / "p.fasta")}], tokenizer={"kind": "protein"},
        splits={"valid": 0, "test": 0}, min_train_shards=2,
    )  # fmt: skip
    train = build_corpus(config).splits["train"]
    assert train.length_histogram == {1: 1, 2: 1, 4: 2, 8: 1, 64: 1, 128: 1}


def test_shards_are_read_by_plain_webdataset(raw, corpus):
    manifest = load_manifest(corpus)
    urls = [str(corpus / shard.path) for split in manifest.splits.values() for shard in split.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 320
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    texts = {f"doc.{n}": json.loads(line)["text"] for n, line in enumerate((raw / "many.jsonl").open())}
    for sample in samples:
        assert sample["npy"].dtype == np.uint16
        assert set(sample["json"]) == {"id", "source", "characters"}
        assert "." not in sample["__key__"]
        text = tokenizer.decode(sample["npy"])
        assert sample["json"]["characters"] == len(text)
        if sample["json"]["source"] == "many.jsonl":
            assert text == texts[sample["json"]["id"]]
    assert len({sample["__key__"] for sample in samples}) == 320


def test_equal_documents_fall_into_one_split_even_if_their_white_space_differs(tmp_path):
    texts = [generated_text(n, 20) for n in range(60)]
    jsonl(tmp_path / "a.jsonl", texts)
    jsonl(tmp_path / "b.jsonl", ["  " + text.replace(" ", "\n ") + "\n" for text in reversed(texts)])
    config = config_for(
        tmp_path, tmp_path / "c", sources=[{"path": str(tmp_path)}], splits={"valid": 0.3, "test": 0.3},
        tokenizer={"vocab_size": 320},
    )  # fmt: skip
    build_corpus(config)
    by_split = {split: {" ".join(t.split()) for t in texts} for split, texts in texts_by_split(config.path).items()}
    assert all(by_split.values())
    assert sum(map(len, by_split.values())) == 60


def test_a_split_is_a_share_of_the_hashes():
    rule = SplitsConfig(valid=0.2, test=0.1)
    splits = [split_of(text_hash(str(n)), rule) for n in range(4000)]
    shares = [splits.count(split) / 4000 for split in ("train", "valid", "test")]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    assert split_of(0, rule) == "test"
    assert split_of(2**64 - 1, SplitsConfig(valid=0.99, test=0)) == "train"
    assert split_of(0, SplitsConfig(valid=0, test=0)) == "train"


def test_a_split_with_no_share_is_there_and_empty(raw, tmp_path):
    manifest = build_corpus(config_for(raw, tmp_path / "c", splits={"valid": 0.2, "test": 0}))
    test = manifest.splits["test"]
    assert (test.documents, test.characters, test.tokens, test.shards, test.length_histogram) == (0, 0, 0, [], {})
    assert manifest.splits["valid"].documents > 0


def test_shards_are_even_enough_and_no_larger_than_asked(raw, tmp_path):
    manifest = build_corpus(config_for(raw, tmp_path / "c", shard_bytes=2**16, splits={"valid": 0.4, "test": 0.1}))
    assert len(manifest.splits["train"].shards) >= 8
    assert len(manifest.splits["valid"].shards) > 1
    assert len(manifest.splits["test"].shards) >= 1
    for split in manifest.splits.values():
        assert all(shard.bytes <= 2**16 or shard.samples == 1 for shard in split.shards)
    sizes = [shard.bytes for shard in manifest.splits["train"].shards]
    assert max(sizes) < 2 * min(sizes)


def test_a_group_that_outgrows_its_shard_is_cut_into_several(corpus, tmp_path):
    """Characters without a piece take three tokens each, far more than the plan reckons with."""
    strange = "".join(chr(0x4E00 + n) for n in range(2000))
    jsonl(tmp_path / "a.jsonl", [generated_text(n, 50) for n in range(20)] + [f"{n}{strange}" for n in range(20)])
    config = config_for(
        tmp_path, tmp_path / "c", sources=[{"path": str(tmp_path / "a.jsonl")}], shard_bytes=2**16, min_train_shards=1,
        splits={"valid": 0, "test": 0}, tokenizer={"model": str(corpus / "tokenizer.model")},
    )  # fmt: skip
    shards = build_corpus(config).splits["train"].shards
    assert any("-1.tar" in shard.path for shard in shards)
    assert all(shard.bytes <= 2**16 for shard in shards)
    assert verify_corpus(config.path) == []
    assert len(texts_by_split(config.path)["train"]) == 40


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 2000), st.integers(1, 20))
@settings(deadline=None)
def test_groups_hold_everything_within_the_limit_and_are_as_many_as_asked(sizes, limit, at_least):
    runs = cut_evenly(np.array(sizes, dtype=np.int64), limit, at_least)
    assert sum(runs) == len(sizes)
    assert all(runs)
    assert len(runs) >= min(at_least, len(sizes))
    ends = np.cumsum(runs)
    for end, length in zip(ends, runs, strict=True):
        assert length == 1 or sum(sizes[end - length : end]) <= limit


def test_groups_of_equal_documents_are_equal():
    assert cut_evenly(np.full(100, 10), 10_000, 4) == [25, 25, 25, 25]
    assert cut_evenly(np.full(100, 10), 100, 4) == [10] * 10
    assert cut_evenly(np.array([]), 100, 1) == []


def test_an_existing_tokenizer_is_copied_into_the_corpus(raw, corpus, tmp_path):
    model = corpus / "tokenizer.model"
    manifest = build_corpus(config_for(raw, tmp_path / "c", tokenizer={"model": str(model)}))
    assert (tmp_path / "c/tokenizer.model").read_bytes() == model.read_bytes()
    assert manifest.tokenizer.kind == "existing"
    assert manifest.splits == load_manifest(corpus).splits


def test_the_tokenizer_sample_is_as_large_as_asked_and_of_training_documents_by_hash():
    found = Scan(
        splits=np.array([0, 1, 0, 0, 2], np.uint8),
        hashes=np.array([9, 1, 4, 7, 0], np.uint64),
        characters=np.array([10, 10, 20, 30, 10]),
        utf8_bytes=np.array([10, 10, 20, 30, 10]),
        sources=[],
    )
    assert sampled_characters(found, 45) == {2: 20, 3: 25}
    assert sampled_characters(found, 1000) == {0: 10, 2: 20, 3: 30}


# ------------------------------------------------------------------------------------- the same bytes, come what may


@pytest.mark.slow
def test_one_and_four_processes_and_another_folder_make_the_same_bytes(raw, corpus, tmp_path):
    build_corpus(config_for(raw, tmp_path / "elsewhere", processes=4))
    assert bytes_of(tmp_path / "elsewhere") == bytes_of(corpus)


KILLED_BUILD = """
import sys, time
from multiprocessing import active_children
from pretrain.config.data import CorpusConfig
from pretrain.data.build.corpus import build_corpus

def report(stage, done, total, documents):
    global calls
    if stage.startswith(sys.argv[2]):
        calls += 1
        if calls == int(sys.argv[3]):
            print("now", *(child.pid for child in active_children()), flush=True)
            time.sleep(600)

calls = 0
if __name__ == "__main__":
    build_corpus(CorpusConfig.model_validate_json(sys.argv[1]), report)
"""


def kill_a_build(folder, config, stage, calls):
    """Start a build, wait until it reports `stage` for the n-th time, kill it there; give its workers' process ids."""
    script = folder / "killed_build.py"
    script.write_text(KILLED_BUILD)
    process = subprocess.Popen(
        [sys.executable, script, config.model_dump_json(), stage, str(calls)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    word, *workers = process.stdout.readline().split()
    assert word == "now"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return [int(pid) for pid in workers]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("stage", "calls", "processes"),
    [
        ("encoding", 4, 1),
        pytest.param("encoding", 4, 2, marks=pytest.mark.slow),
        pytest.param("tokenizer", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_build_leaves_no_manifest_continues_and_makes_the_same_bytes(
    raw, corpus, tmp_path, stage, calls, processes
):
    config = config_for(raw, tmp_path / "c", processes=processes)
    workers = kill_a_build(tmp_path, config, stage, calls)
    assert not (config.path / "manifest.json").exists()
    with pytest.raises(UserError, match="its build was not finished"):
        load_manifest(config.path)
    finished = {p: p.stat().st_mtime_ns for p in config.path.rglob("shard-*.tar")}
    (config.path / "train").mkdir(exist_ok=True)
    (config.path / "train/.shard-000001.tar.0123456789ab.tmp").write_text("half a shard")
    stages = []
    build_corpus(
        config.model_copy(update={"processes": 1}), lambda stage, done, total, documents: stages.append((stage, done))
    )
    assert bytes_of(config.path) == bytes_of(corpus)
    if stage == "encoding":
        assert len(finished) >= 3
        assert sum(p.stat().st_mtime_ns == before for p, before in finished.items()) >= 3
        assert ("tokenizer (continuing)", 1) in stages
        assert next(done for stage, done in stages if stage == "encoding (continuing)") > 0
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == (processes if processes > 1 else 0)
    assert not any(map(is_running, workers)), "workers outlive a killed build"


def test_a_shard_damaged_since_it_was_finished_is_built_again(raw, corpus, tmp_path):
    config = config_for(raw, tmp_path / "c")
    stop_after(config, 5)
    shard = sorted((config.path / "train").glob("*.tar"))[0]
    shard.write_bytes(b"x" * shard.stat().st_size)
    build_corpus(config)
    assert bytes_of(config.path) == bytes_of(corpus)


class StopHereError(Exception):
    pass


def stop_after(config, calls):
    def report(stage, done, total, documents):
        nonlocal calls
        calls -= stage.startswith("encoding")
        if not calls:
            raise StopHereError

    with pytest.raises(StopHereError):
        build_corpus(config, report)


def test_other_settings_start_an_unfinished_build_again_without_leftovers(raw, corpus, tmp_path):
    path = tmp_path / "c"
    stop_after(config_for(raw, path, tokenizer={"vocab_size": 350}, min_train_shards=20), 20)
    build_corpus(config_for(raw, path))
    assert bytes_of(path) == bytes_of(corpus)


def test_raw_files_changed_since_the_kill_start_the_build_again(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [generated_text(n, 50) for n in range(40)])
    config = config_for(tmp_path, tmp_path / "c", sources=[{"path": str(source)}], splits={"valid": 0, "test": 0})
    stop_after(config, 4)
    os.utime(source, ns=(0, 0))
    stages = set()
    build_corpus(config, lambda stage, done, total, documents: stages.add(stage))
    assert stages == {"reading", "tokenizer", "encoding"}


@pytest.mark.parametrize(("count", "words"), [(39, 50), (41, 50), (40, 51), (40, 50)])
def test_raw_files_that_change_during_the_build_stop_it(tmp_path, count, words):
    source = jsonl(tmp_path / "a.jsonl", [generated_text(n, 50) for n in range(40)])
    config = config_for(tmp_path, tmp_path / "c", sources=[{"path": str(source)}], splits={"valid": 0, "test": 0})

    def report(stage, done, total, documents):
        if stage == "encoding" and done == 0:
            jsonl(source, [generated_text(n, words) for n in range(count)])
            os.utime(source, ns=(0, 0))

    with pytest.raises(UserError, match="raw files changed while"):
        build_corpus(config, report)


# -------------------------------------------------------------------------------------------- a finished corpus


def test_a_finished_corpus_is_returned_at_once(raw, corpus):
    before = {p: p.stat().st_mtime_ns for p in corpus.rglob("*")}
    stages = []
    manifest = build_corpus(config_for(raw, corpus, processes=3), lambda *call: stages.append(call[0]))
    assert manifest == load_manifest(corpus)
    assert stages == ["already built"]
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob("*")} == before


def test_a_finished_corpus_is_never_replaced_by_one_of_other_settings(raw, corpus):
    before = bytes_of(corpus)
    with pytest.raises(UserError, match="finished corpus of other sources or settings.*another corpus.path, or delete"):
        build_corpus(config_for(raw, corpus, tokenizer={"vocab_size": 350}))
    assert bytes_of(corpus) == before


def test_moved_raw_files_are_still_the_same_sources(raw, corpus, tmp_path):
    for path in raw.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert build_corpus(config_for(tmp_path, corpus)) == load_manifest(corpus)


def test_shards_that_no_build_made_are_not_built_over(raw, tmp_path):
    (tmp_path / "c/train").mkdir(parents=True)
    (tmp_path / "c/train/shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"shard-000000\.tar was not made by a build"):
        build_corpus(config_for(raw, tmp_path / "c"))
    assert (tmp_path / "c/train/shard-000000.tar").read_bytes() == b"precious"


def test_two_builds_at_once_in_one_place_are_refused(raw, tmp_path):
    config = config_for(raw, tmp_path / "c")

    def report(stage, done, total, documents):
        if stage == "tokenizer" and not done:
            with pytest.raises(UserError, match="another process is building"):
                build_corpus(config)

    build_corpus(config, report)
    assert verify_corpus(config.path) == []


def test_verify_finds_nothing_wrong_with_a_good_corpus(corpus):
    assert verify_corpus(corpus, processes=2) == []


def test_verify_names_every_damaged_missing_or_stray_file(raw, tmp_path):
    path = tmp_path / "c"
    manifest = build_corpus(config_for(raw, path))
    train = [path / shard.path for shard in manifest.splits["train"].shards]
    content = bytearray(train[0].read_bytes())
    content[5000] ^= 1
    train[0].write_bytes(content)
    train[1].write_bytes(train[1].read_bytes()[:-1])
    train[2].unlink()
    (path / manifest.splits["valid"].shards[0].index_path).write_bytes(b"")
    (path / "token_counts.npy").write_bytes(b"")
    (path / "train/shard-999999.tar").write_bytes(b"")
    problems = "\n".join(verify_corpus(path))
    for words in (
        f"{train[0]} is damaged", f"{train[1]} has", f"{train[2]} is missing",
        "valid/shard-000000.index.npy is damaged",
        "token_counts.npy is damaged", "shard-999999.tar is not in the manifest",
    ):  # fmt: skip
        assert words in problems
    assert len(problems.splitlines()) == 6
    (path / "tokenizer.model").write_bytes(b"")
    assert "does not belong to this corpus" in verify_corpus(path)[0]
    (path / "manifest.json").unlink()
    assert "its build was not finished" in verify_corpus(path)[0]


def test_the_description_says_what_data_show_prints(raw, corpus):
    description = describe_corpus(corpus)
    by_split = texts_by_split(corpus)
    tokens = sum(split.tokens for split in description.manifest.splits.values())
    characters = sum(len(text) for texts in by_split.values() for text in texts)
    assert description.characters_per_token == pytest.approx(characters / tokens)
    counts = np.load(corpus / "token_counts.npy")
    shares = counts[counts > 0] / counts.sum()
    assert description.unigram_entropy == pytest.approx(-sum(p * np.log(p) for p in shares))
    assert description.examples[0] == by_split["train"][0][:200]
    assert len(description.examples) == 3


# ------------------------------------------------------------------------------------------------- what is refused


def test_no_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match="corpus.sources is empty"):
        build_corpus(CorpusConfig(path=tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_sources_without_a_document_are_refused_with_what_was_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text("x\ny\n")
    config = config_for(tmp_path, tmp_path / "c", sources=[{"path": str(tmp_path / "a.jsonl")}], on_bad="skip")
    with pytest.raises(UserError, match="no document in the 1 files .*2 x invalid JSON"):
        build_corpus(config)


def test_a_bad_record_stops_the_build_or_is_counted(raw, tmp_path):
    lines = (raw / "many.jsonl").read_text() + "broken\n"
    (tmp_path / "a.jsonl").write_text(lines)
    sources = [{"path": str(tmp_path / "a.jsonl")}]
    with pytest.raises(UserError, match=r"a\.jsonl:301 is not JSON.*corpus\.on_bad=skip"):
        build_corpus(config_for(raw, tmp_path / "c", sources=sources))
    manifest = build_corpus(config_for(raw, tmp_path / "c", sources=sources, on_bad="skip"))
    assert manifest.sources[0].skipped == {"invalid JSON": 1}
    assert manifest.sources[0].documents == 300


def test_a_corpus_too_small_for_its_splits_is_refused_with_settings_that_help(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [generated_text(n, 30) for n in range(12)])
    settings = {"sources": [{"path": str(source)}], "min_train_shards": 2, "tokenizer": {"vocab_size": 300}}
    with pytest.raises(UserError) as caught:
        build_corpus(config_for(tmp_path, tmp_path / "c", splits={"valid": 0.001, "test": 0}, **settings))
    message = str(caught.value)
    assert "of its 12 documents none fell into valid with corpus.splits.valid = 0.001" in message
    assert "corpus.sources[].separator" in message
    assert "corpus.splits.valid=0.2 or 0" in message
    assert build_corpus(config_for(tmp_path, tmp_path / "c", splits={"valid": 0, "test": 0}, **settings))


def test_a_corpus_too_small_for_its_streams_is_refused_with_a_number_that_works(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [generated_text(n, 30) for n in range(12)])
    settings = {
        "sources": [{"path": str(source)}], "splits": {"valid": 0, "test": 0}, "tokenizer": {"vocab_size": 300},
    }  # fmt: skip
    with pytest.raises(UserError, match="12 training documents.*min_train_shards = 13.*data.streams and .* at most 12"):
        build_corpus(config_for(tmp_path, tmp_path / "c", min_train_shards=13, **settings))
    manifest = build_corpus(config_for(tmp_path, tmp_path / "c", min_train_shards=12, **settings))
    assert [shard.samples for shard in manifest.splits["train"].shards] == [1] * 12


def test_a_tokenizer_model_that_is_not_there_is_refused(raw, tmp_path):
    with pytest.raises(UserError, match="corpus.tokenizer.model = .* is no file"):
        build_corpus(config_for(raw, tmp_path / "c", tokenizer={"model": str(tmp_path / "none")}))


def test_a_full_disk_is_explained_and_what_is_finished_is_kept(raw, corpus, tmp_path, monkeypatch):
    config = config_for(raw, tmp_path / "c")
    write, written = shard_builder.write_shard, []

    def fill_the_disk(*arguments):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(*arguments))
        return written[-1]

    monkeypatch.setattr(shard_builder, "write_shard", fill_the_disk)
    with pytest.raises(UserError, match="no space left for .* run the same command again: it continues"):
        build_corpus(config)
    monkeypatch.undo()
    build_corpus(config)
    assert bytes_of(config.path) == bytes_of(corpus)


def test_a_place_that_cannot_be_written_to_is_named(raw, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file/inside"):
        with pytest.raises(UserError, match=f"{path} cannot be written to .*name a folder that can be made"):
            build_corpus(config_for(raw, path))
    assert (tmp_path / "file").read_text() == "precious"

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "there")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot be written to .Read-only file system: there"):
        build_corpus(config_for(raw, tmp_path / "c"))


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_to_have_one(raw, tmp_path):
    config = config_for(raw, tmp_path / "c", processes=2).model_dump_json()
    script = tmp_path / "script.py"
    script.write_text(
        "from pretrain.config.data import CorpusConfig\nfrom pretrain.data.build.corpus import build_corpus\n"
        f"build_corpus(CorpusConfig.model_validate_json({config!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert 'put the call under `if __name__ == "__main__":`, or set corpus.processes=1' in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].endswith('put the call under `if __name__ == "__main__":`)')


def test_a_build_in_several_processes_imports_torch_in_none_of_them(raw, corpus, tmp_path):
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nraise ImportError")
    config = config_for(raw, tmp_path / "c", processes=2).model_dump_json()
    (tmp_path / "build.py").write_text(
        "from pretrain.config.data import CorpusConfig\nfrom pretrain.data.build.corpus import build_corpus\n"
        f"if __name__ == '__main__':\n    build_corpus(CorpusConfig.model_validate_json({config!r}))\n"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    subprocess.run([sys.executable, tmp_path / "build.py"], check=True, env={**os.environ, "PYTHONPATH": path})
    assert bytes_of(tmp_path / "c") == bytes_of(corpus)
    assert not (tmp_path / "imported").exists()


# ----------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["books", "proteins"])
def test_the_data_configs_that_come_with_diptych_are_valid(name):
    config = load_config(str(ROOT / f"configs/data/{name}.yaml"))
    assert config.corpus.path.parts[-2:] == ("corpora", name)


@needs_real_data
def test_the_books_config_cuts_the_books_into_chapters(monkeypatch):
    monkeypatch.setenv("DIPTYCH_DATA", str(REAL_DATA))
    sources = load_config(str(ROOT / "configs/data/books.yaml")).corpus.sources
    counts = {}
    for source in sources:
        documents = read_documents(source, find_inputs(source), "error", Counter())
        counts[source.path.rsplit("/", 1)[1].split(".")[0]] = sum(len(d.text) > 1000 for d in documents)
    assert counts == {
        "anna-karenina": 239, "bleak-house": 68, "david-copperfield": 65, "don-quixote": 127, "middlemarch": 88,
        "moby-dick": 136, "war-and-peace": 365,
    }  # fmt: skip


@needs_real_data
def test_a_real_proteome_becomes_a_corpus_of_residues(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_DATA", str(REAL_DATA))
    config = load_config(
        str(ROOT / "configs/data/proteins.yaml"), [f"corpus.path={tmp_path / 'c'}", "corpus.processes=1"]
    ).corpus
    source = config.sources[0].model_copy(update={"path": config.sources[0].path.replace("*", "*Synechocystis*")})
    manifest = build_corpus(config.model_copy(update={"sources": [source]}))
    assert sum(split.documents for split in manifest.splits.values()) == 3508
    assert manifest.token_dtype == "uint8"
    assert all(split.tokens == split.characters for split in manifest.splits.values())
    assert describe_corpus(config.path).unigram_entropy == pytest.approx(2.87, abs=0.03)
