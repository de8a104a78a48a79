"""Bad input at the command line: exit code 2, and an answer that says what to do."""

import json
from pathlib import Path

import pytest

from tests.integration.test_whole_runs import diptych

BASE = "corpus.tokenizer.vocab_size=64"


def answer(folder: Path, *arguments: str) -> str:
    printed = diptych(folder, *arguments, check=2)
    assert "Traceback" not in printed
    return printed


@pytest.fixture
def project(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "c.yaml").write_text("corpus: {path: corpus, sources: [{path: raw}], tokenizer: {vocab_size: 64}}\n")
    return tmp_path


def test_a_misspelt_key(project):
    printed = answer(project, "train", "c.yaml", "training.token=5")
    assert "training.token: unknown key (value 5); did you mean training.tokens?" in printed


def test_a_missing_corpus(project):
    printed = answer(project, "train", "c.yaml", "corpus.sources=[]")
    assert f"no corpus at {project / 'corpus'}" in printed
    assert "diptych data build" in printed


def test_an_empty_input_file(project):
    (project / "raw" / "nothing.txt").write_text("")
    assert "nothing.txt" in (printed := answer(project, "data", "build", "c.yaml"))
    assert "is empty" in printed


def test_text_that_is_not_utf8(project):
    (project / "raw" / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    assert "latin.txt" in (printed := answer(project, "data", "build", "c.yaml"))
    assert "UTF-8" in printed
    assert "--on-bad skip" in printed


def test_an_illegal_residue_is_named_and_can_be_skipped(project):
    residues = "ACDEFGHIKLMNPQRSTVWY"
    records = "".join(f">good{i}\nMKV{residues}{residues[i % 20]}{residues[i // 20]}\n" for i in range(300))
    (project / "raw" / "p.fasta").write_text(records + ">bad1 something\nMKJ\n")
    arguments = (
        "data",
        "build",
        "c.yaml",
        "corpus.tokenizer.kind=protein",
        "corpus.min_train_shards=4",
        "data.streams=4",
    )
    printed = answer(project, *arguments)
    assert "bad1" in printed
    assert "'J'" in printed
    diptych(project, *arguments, "--on-bad", "skip")
    sources = json.loads((project / "corpus" / "manifest.json").read_text())["sources"]
    assert (sources[0]["documents"], sum(sources[0]["skipped"].values())) == (300, 1)


def test_a_corpus_too_small_for_its_splits_or_its_streams(project):
    (project / "raw" / "one.txt").write_text("Only one document, " * 50)
    printed = answer(project, "data", "build", "c.yaml")
    assert "too small" in printed
    for number in range(30):
        (project / "raw" / f"{number}.txt").write_text(f"Document number {number}, " * 50)
    printed = answer(project, "data", "build", "c.yaml", "corpus.splits.valid=0.2", "corpus.splits.test=0.2")
    assert "too small" in printed
    assert "streams" in printed


def test_a_tokenizer_that_does_not_belong_to_the_corpus(corpus_values, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(corpus_values["path"], copy)
    with (copy / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    (tmp_path / "c.yaml").write_text("corpus: {path: copy}\ndata: {streams: 16}\n")
    printed = answer(tmp_path, "train", "c.yaml")
    assert "tokenizer.model does not belong to this corpus" in printed


def test_a_run_folder_that_holds_another_run(corpus_values, tmp_path):
    (tmp_path / "runs" / "c").mkdir(parents=True)
    (tmp_path / "runs" / "c" / "precious.txt").write_text("mine")
    (tmp_path / "c.yaml").write_text(f"corpus: {{path: '{corpus_values['path']}'}}\ndata: {{streams: 16}}\n")
    assert "is no run folder" in answer(tmp_path, "train", "c.yaml")
