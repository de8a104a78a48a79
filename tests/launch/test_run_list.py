"""The list of runs, and the numbers in it."""

import json
from pathlib import Path

import pytest

from launch.run_list import RunRow, find_run, list_runs, runs_table
from launch.terminal.console import compact, duration
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.status import Status

NOW = 1_800_000_000.0


def make_run(folder: Path, name: str, status: object = None) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: x\n")
    if status is not None:
        (run / "status.json").write_text(status if isinstance(status, str) else json.dumps(status))
    return run


def only_row(folder: Path) -> RunRow:
    (row,) = list_runs(folder, NOW)
    return row


def test_a_run_at_work_is_listed_with_its_numbers(tmp_path):
    status = {
        "state": "training",
        "step": 120,
        "tokens": 980_000,
        "total_tokens": 3_500_000,
        "loss": 4.25,
        "validation_loss": 4.5,
        "tokens_per_s": 20_100.0,
        "heartbeat": NOW - 2,
        "a_key_of_a_later_version": 1,
    }
    run = make_run(tmp_path, "first", status)
    status.pop("a_key_of_a_later_version")
    row = RunRow("first", RunFolder(run), "training", Status(**status), age_s=2.0, restarts=0)
    assert only_row(tmp_path) == row
    cells = [str(next(iter(column.cells))) for column in runs_table([row]).columns]
    assert cells == ["first", "training", "120", "980k of 3.50M", "4.250", "4.500", "20.1k", "2 s ago", "-", "0"]


def test_a_run_at_work_whose_heartbeat_stopped_is_lost(tmp_path):
    make_run(tmp_path, "run", {"state": "saving", "heartbeat": NOW - 300, "tokens_per_s": 5.0})
    assert only_row(tmp_path).state == "lost (last seen 5 m ago)"
    assert only_row(tmp_path).status.tokens_per_s is None


def test_a_run_that_ended_is_not_lost_however_old(tmp_path):
    make_run(tmp_path, "run", {"state": "done", "heartbeat": NOW - 1e6})
    assert only_row(tmp_path).state == "done"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"state": "training"}', '{"state": 3, "heartbeat": "soon"}', "\0"])
def test_a_damaged_status_is_a_state_and_not_an_error(tmp_path, damage):
    make_run(tmp_path, "run", damage)
    assert only_row(tmp_path).state == "unreadable status.json"


def test_a_loss_that_is_not_finite_is_read(tmp_path):
    status = RunFolder(make_run(tmp_path, "run", '{"state": "failed", "heartbeat": 1, "loss": NaN}')).status()
    assert status is not None
    assert status.loss != status.loss


def test_only_folders_with_a_config_are_runs_and_they_come_by_name(tmp_path):
    make_run(tmp_path, "b")
    make_run(tmp_path, "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("")
    assert [(row.name, row.state) for row in list_runs(tmp_path, NOW)] == [("a", "not started"), ("b", "not started")]
    assert list_runs(tmp_path / "nowhere", NOW) == []


def test_a_run_is_found_by_name_or_by_path(tmp_path):
    run = make_run(tmp_path, "first")
    assert find_run("first", tmp_path) == RunFolder(run)
    assert find_run(str(run), tmp_path / "elsewhere") == RunFolder(run)


def test_an_unknown_run_is_answered_with_the_nearest(tmp_path):
    make_run(tmp_path, "quickstart")
    with pytest.raises(UserError, match="did you mean quickstart"):
        find_run("quikstart", tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (987, "987"), (1000, "1.00k"), (12_345, "12.3k"), (999_999, "1.00M"), (6.2e11, "620G")],
)
def test_counts_are_short(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(42, "42 s"), (300, "5 m"), (12_000, "3 h 20 m"), (190_000, "2 d 4 h")])
def test_time_spans_are_short(seconds, text):
    assert duration(seconds) == text
