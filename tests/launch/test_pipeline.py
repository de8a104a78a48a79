"""The road from a config to an exit code, with the ranks and the evaluation replaced."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import pipeline
from launch.preparation import ensure_corpus
from launch.terminal.console import make_console
from pretrain.config.data import CorpusConfig
from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.lock import run_lock
from pretrain.training.monitor.profiled_steps import ProfiledSteps


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    values = {"name": "run", "runs": tmp_path / "runs", "corpus": {"path": tmp_path / "corpus"}}
    return RunConfig.model_validate({**values, "training": {"tokens": 1000}})


@pytest.fixture
def road(config, monkeypatch):
    """Train with replaced parts; `calls` says which were called."""
    calls: list[str] = []
    parts = SimpleNamespace(calls=calls, exit_code=0)

    def open_run_folder(*_: object) -> list[str]:
        config.run_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return ["resuming at step 7"]

    def launch(*_: object) -> int:
        calls.append("launch")
        return parts.exit_code

    def evaluate(*_: object, **__: object) -> None:
        calls.append("evaluate")

    monkeypatch.setattr(pipeline, "open_run_folder", open_run_folder)
    monkeypatch.setattr(pipeline, "ensure_corpus", lambda *_: None)
    monkeypatch.setattr(pipeline, "launch_local", launch)
    monkeypatch.setattr(pipeline, "evaluate_context", evaluate)
    parts.run = lambda **options: pipeline.train_and_evaluate(config, 1, make_console(), **options)
    return parts


def test_a_training_ends_with_its_evaluation(road, capsys):
    assert road.run() == 0
    assert road.calls == ["launch", "evaluate"]
    assert "resuming at step 7" in capsys.readouterr().out


def test_the_evaluation_can_be_left_out(road):
    assert road.run(evaluate=False) == 0
    assert road.calls == ["launch"]


@pytest.mark.parametrize("exit_code", [1, 2, 75])
def test_a_training_that_did_not_end_is_not_evaluated(road, exit_code):
    road.exit_code = exit_code
    assert road.run() == exit_code
    assert road.calls == ["launch"]


def test_a_finished_training_is_only_evaluated(road, config):
    status = {"state": "done", "tokens": 1024, "checkpoint": "step-00000009", "heartbeat": time.time()}
    (config.run_folder / "checkpoints" / "step-00000009").mkdir(parents=True)
    (config.run_folder / "status.json").write_text(json.dumps(status))
    assert road.run() == 0
    assert road.calls == ["evaluate"]


@pytest.mark.parametrize("change", [{"tokens": 900}, {"state": "interrupted"}, {"checkpoint": "step-00000010"}])
def test_a_training_that_has_more_to_do_is_launched(road, config, change):
    status = {"state": "done", "tokens": 1024, "checkpoint": "step-00000009", "heartbeat": time.time()}
    (config.run_folder / "checkpoints" / "step-00000009").mkdir(parents=True)
    (config.run_folder / "status.json").write_text(json.dumps({**status, **change}))
    assert road.run() == 0
    assert road.calls == ["launch", "evaluate"]


def test_a_failed_evaluation_says_that_the_training_is_done(road, monkeypatch):
    def evaluate(*_: object, **__: object) -> None:
        raise UserError("no document is long enough")

    monkeypatch.setattr(pipeline, "evaluate_context", evaluate)
    with pytest.raises(UserError, match="run is trained, but could not be evaluated: no document is long enough"):
        road.run()


def test_profiled_steps_reach_the_ranks_or_are_refused_before_there_are_any(road, manifest, monkeypatch):
    given: list[dict[str, str]] = []
    monkeypatch.setattr(pipeline, "ensure_corpus", lambda *_: manifest)
    monkeypatch.setattr(pipeline, "launch_local", lambda *arguments: given.append(arguments[3]) or 0)
    assert road.run(profile=ProfiledSteps(1, 1)) == 0
    assert given == [{"DIPTYCH_PROFILE": "1:1"}]
    with pytest.raises(UserError, match="1,000 tokens take fewer than"):
        road.run(profile=ProfiledSteps(900, 950))
    assert len(given) == 1


@pytest.mark.parametrize(("gpus", "nproc", "ranks"), [(0, None, 1), (0, 4, 4), (2, None, 2), (2, 1, 1)])
def test_there_is_one_rank_per_gpu_unless_told(config, monkeypatch, gpus, nproc, ranks):
    monkeypatch.setattr(pipeline, "num_gpus", lambda: gpus)
    assert pipeline.choose_num_ranks(config, nproc) == ranks


def test_more_ranks_than_gpus_are_refused(config, monkeypatch):
    monkeypatch.setattr(pipeline, "num_gpus", lambda: 2)
    with pytest.raises(UserError, match="this machine has 2 GPUs"):
        pipeline.choose_num_ranks(config, 4)


def test_a_folder_that_cannot_be_written_is_an_answer(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), run_lock(RunFolder(tmp_path / "file" / "runs" / "x")):
        pass


def test_a_corpus_of_other_settings_is_refused_but_not_for_skipped_records(corpus_values):
    corpus = CorpusConfig.model_validate(corpus_values)
    built = ensure_corpus(corpus, make_console())
    assert ensure_corpus(corpus.model_copy(update={"on_bad": "skip"}), make_console()) == built
    assert ensure_corpus(corpus.model_copy(update={"sources": []}), make_console()) == built
    with pytest.raises(UserError, match="other sources or settings"):
        ensure_corpus(corpus.model_copy(update={"min_train_shards": 17}), make_console())


def test_a_corpus_is_used_as_it_is_when_its_raw_files_are_gone(corpus_values):
    sources = [{"path": "/nowhere/at all"}]
    corpus = CorpusConfig.model_validate({**corpus_values, "sources": sources})
    assert ensure_corpus(corpus, make_console()).splits["train"].documents > 0
