"""Passwords in URLs: no file of a run holds them, and whoever reads the run's config has them again, or an answer."""

import os

import pytest
from rich.console import Console

from launch import control, pipeline
from launch.control import resume_run
from launch.preparation import ensure_corpus
from pretrain.config.data import CorpusConfig
from pretrain.errors import UserError
from pretrain.evaluation.context.request import Request
from pretrain.evaluation.context.session import config_of_run
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder

URL = "https://me:pa55@host/corpus"


@pytest.fixture
def run(make_config, manifest, monkeypatch):
    """A run whose corpus is behind a password, just opened."""
    monkeypatch.setenv("DIPTYCH_CORPUS_URL", "")  # so that it is taken back at the end
    monkeypatch.delenv("DIPTYCH_CORPUS_URL")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = make_config(corpus={"url": URL})
    open_run_folder(config, manifest)
    return RunFolder.of(config)


def test_no_file_of_a_run_holds_the_password(run):
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert run.config_file in files
    assert not any(b"pa55" in path.read_bytes() for path in files)
    assert run.public_config().corpus.url == "https://***@host/corpus"


@pytest.mark.parametrize("read", [RunFolder.config, lambda run: config_of_run(run.path, None, ())])
def test_the_config_of_a_run_has_its_password_again_or_is_refused(run, monkeypatch, read):
    with pytest.raises(UserError, match="set DIPTYCH_CORPUS_URL to the whole URL"):
        read(run)
    monkeypatch.setenv("DIPTYCH_CORPUS_URL", "https://me:pa55@host/another")
    with pytest.raises(UserError, match=r"without its password or token \(https://\*\*\*@host/corpus\)"):
        read(run)
    monkeypatch.setenv("DIPTYCH_CORPUS_URL", URL)
    assert read(run).corpus.url == URL


def test_resuming_trains_with_the_password_and_never_with_its_placeholder(run, monkeypatch):
    started = []
    monkeypatch.setattr(control, "train_and_evaluate", lambda config, *_: started.append(config.corpus.url) or 75)
    with pytest.raises(UserError, match="DIPTYCH_CORPUS_URL"):
        resume_run(run, Console())
    assert started == []
    monkeypatch.setenv("DIPTYCH_CORPUS_URL", URL)
    assert resume_run(run, Console()) == 75
    assert started == [URL]


def test_ranks_and_the_evaluation_that_follows_a_training_have_the_password(run, make_config, monkeypatch):
    seen = {}
    monkeypatch.setattr(pipeline, "launch_local", lambda *_: seen.update(ranks=os.environ["DIPTYCH_CORPUS_URL"]) or 0)

    def evaluate(request: Request, *_: object, **__: object) -> None:
        seen["evaluation"] = RunFolder(request.run_folder).config().corpus.url

    monkeypatch.setattr(pipeline, "evaluate_context", evaluate)
    assert pipeline.train_and_evaluate(make_config(corpus={"url": URL}), 1, Console()) == 0
    assert seen == {"ranks": URL, "evaluation": URL}


def test_a_corpus_is_not_built_from_a_source_without_its_password_but_one_that_is_there_is_used(
    corpus_values, tmp_path, monkeypatch
):
    hidden = {**corpus_values, "sources": [{"path": "https://***@host/texts.jsonl"}]}
    monkeypatch.setattr("pretrain.data.fetching.open_url", lambda *_: pytest.fail("the placeholder was tried"))
    assert ensure_corpus(CorpusConfig.model_validate(hidden), Console()).splits["train"].documents > 0
    missing = CorpusConfig.model_validate({**hidden, "path": str(tmp_path / "corpus")})
    with pytest.raises(UserError, match=r"https://\*\*\*@host/texts.jsonl without its password.*diptych data build"):
        ensure_corpus(missing, Console())
