"""The record of a run is true: its config says what was trained, and a start that trains nothing changes nothing."""

import pytest

from pretrain.config.load import to_yaml
from pretrain.errors import UserError
from pretrain.run.attempt import Attempt, take_attempt
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from tests.ranks import run_on_ranks, train_alone

LEARNING_RATE = 0.0123
STEP = '{"step": 1, "tokens": 500, "loss": 6.0}\n'


def with_rate(config, **training):
    """A config of the same run with another learning rate."""
    optimizer = config.optimizer.model_copy(update={"learning_rate": LEARNING_RATE})
    return config.model_copy(update={"optimizer": optimizer, "training": config.training.model_copy(update=training)})


def rate(config):
    return config.optimizer.learning_rate


def files_of(run):
    """What says what was trained: file -> content."""
    return {path.name: path.read_bytes() for path in (run.config_file, run.metrics_file, run.environment_file)}


# ------------------------------------------------------------------------------------------- without any training


def test_a_forgotten_override_on_a_finished_run_changes_nothing(finished, manifest):
    run = RunFolder.of(finished)
    before = files_of(run)
    lines = open_run_folder(with_rate(finished), manifest)
    assert f"changed since: optimizer.learning_rate {rate(finished)} -> {LEARNING_RATE}" in lines
    assert files_of(run) == before
    assert rate(run.next_config()) == rate(finished)


def test_where_run_and_corpus_lie_and_how_it_is_evaluated_may_change_after_the_training(finished, manifest):
    corpus = finished.corpus.model_copy(update={"path": finished.corpus.path.with_name("moved")})
    evaluation = finished.evaluation.model_copy(update={"windows": 7})
    runs = finished.runs.rename(finished.runs.with_name("moved runs"))
    given = {"runs": runs, "corpus": corpus, "evaluation": evaluation}
    open_run_folder(with_rate(finished).model_copy(update=given), manifest)
    config = RunFolder(runs / finished.name).config()
    assert config == finished.model_copy(update=given)


def test_a_changed_config_is_that_of_the_attempt_and_of_the_run_only_after_a_step(make_config, manifest):
    config = make_config()
    run = RunFolder.of(config)
    open_run_folder(config, manifest)
    first = take_attempt(run)
    assert run.config() == config
    run.metrics_file.write_text(STEP)
    open_run_folder(with_rate(config), manifest)
    second = take_attempt(run)
    assert [rate(attempt.config()) for attempt in (first, second)] == [rate(config), LEARNING_RATE]
    assert rate(run.config()) == rate(config)
    first.trained_under(with_rate(config))  # too late: it is superseded
    assert rate(run.config()) == rate(config)
    third = take_attempt(run)  # a requeued job: nobody opens the run for it
    assert rate(third.config()) == LEARNING_RATE
    third.trained_under(third.config())
    assert rate(run.config()) == LEARNING_RATE
    assert sorted(path.name for path in run.attempts.glob("*.yaml")) == ["0001.yaml", "0002.yaml", "0003.yaml"]


def test_opening_a_run_as_it_is_takes_a_change_back_that_nothing_was_trained_under(make_config, manifest):
    config = make_config()
    open_run_folder(config, manifest)
    RunFolder.of(config).metrics_file.write_text(STEP)
    open_run_folder(with_rate(config), manifest)
    open_run_folder(config, manifest)
    assert take_attempt(RunFolder.of(config)).config() == config


def test_a_run_of_an_earlier_version_has_one_config(make_config):
    config = make_config()
    run = RunFolder.of(config)
    run.attempts.mkdir(parents=True)
    (run.attempts / "0001.json").write_text("{}")
    run.config_file.write_text(to_yaml(config))
    assert Attempt(run, 1).config() == config
    assert take_attempt(run).config() == config


def test_fewer_tokens_than_are_trained_are_a_question_and_those_of_the_last_step_are_not(finished, manifest):
    def open_with(tokens):
        return open_run_folder(with_rate(finished, tokens=tokens), manifest)

    run = RunFolder.of(finished)
    trained = [record["tokens"] for record in run.metrics() if "loss" in record]
    for tokens in (trained[-1], finished.training.tokens, trained[-2] + 1):
        open_with(tokens)
    for tokens in (trained[-2], 1):
        with pytest.raises(UserError) as answer:
            open_with(tokens)
        told = f"trained on {trained[-1]:,} tokens already, but training.tokens is {tokens:,}"
        assert all(words in str(answer.value) for words in (told, "raise it", "leave the override out", "another name"))


# ------------------------------------------------------------------------------------------------ with a training


def train_each(rank, configs):
    """What a launcher, torchrun or a job start one after another; files and status after each."""
    found = []
    for config in configs:
        train_alone(rank, config)
        run = RunFolder.of(config)
        found.append((files_of(run), run.status()))
    return found


def test_a_start_with_nothing_to_train_leaves_the_record_and_one_that_trains_writes_it(finished, manifest, tmp_path):
    run = RunFolder.of(finished)
    run.environment_file.write_text('{"world_size": 4}')
    files, status = files_of(run), run.status()
    longer = with_rate(finished, tokens=status.tokens + 1)
    open_run_folder(longer, manifest)
    ((nothing, something),) = run_on_ranks(train_each, 1, tmp_path / "ranks", [with_rate(finished), longer])
    assert nothing[0] == files
    assert nothing[1].attempt > status.attempt
    changing = {"attempt", "heartbeat", "events", "seconds_left"}
    assert nothing[1].model_dump(exclude=changing) == status.model_dump(exclude=changing)
    assert rate(run.config()) == LEARNING_RATE
    records = run.metrics()
    validated = [record["step"] for record in records if "validation_loss" in record]
    assert validated == [status.step, something[1].step]
    assert records[-1]["step"] == something[1].step > status.step
    assert not run.pending_config.exists()


def test_a_run_that_has_not_trained_takes_any_config(make_config, manifest):
    open_run_folder(make_config(data={"mask_rate": 0.1}), manifest)
    corrected = make_config(data={"mask_rate": 0.3})
    assert open_run_folder(corrected, manifest) == []
    assert RunFolder.of(corrected).config().data.mask_rate == 0.3
