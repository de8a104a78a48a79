"""`--profile N:M`: what may be asked for, and what is written."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from pretrain.training.monitor.profiled_steps import VARIABLE, ProfiledSteps, check_steps, most_steps, traces
from pretrain.training.monitor.profiler import StepProfiler
from tests.ranks import run_on_ranks
from tests.training.test_training import curve, train


def test_steps_are_read_from_the_command_line():
    assert ProfiledSteps.parse("20:25") == ProfiledSteps(20, 25)
    assert ProfiledSteps.parse("7") == ProfiledSteps(7, 7)
    assert ProfiledSteps.parse(str(ProfiledSteps(3, 102))) == ProfiledSteps(3, 102)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "expected the first and the last step"),
        ("20-25", "expected the first and the last step"),
        ("20:", "expected the first and the last step"),
        ("-1:5", "expected the first and the last step"),
        ("1:2:3", "expected the first and the last step"),
        ("0:5", "the first step of a run is 1"),
        ("25:20", "the last step comes before the first"),
        ("1:101", "a trace of 101 steps is too large; at most 100"),
    ],
)
def test_nonsense_is_answered(text, answer):
    with pytest.raises(UserError, match=answer):
        ProfiledSteps.parse(text)


def test_steps_that_the_run_does_not_come_to_are_refused(make_config, manifest):
    config, train = make_config(), manifest.splits["train"]
    most = most_steps(config, train)
    # 12,000 tokens in steps of 16 rows of at most 32; most_steps knows less than that rows are mostly full.
    assert 12_000 / (16 * 32) < most < 4 * 12_000 / (16 * 32)
    assert check_steps(ProfiledSteps(5, 6), config, train, done=4)
    assert check_steps(ProfiledSteps(most, most), config, train, done=4)
    with pytest.raises(UserError, match=f"12,000 tokens take fewer than {most + 1} steps"):
        check_steps(ProfiledSteps(most, most + 1), config, train, done=4)
    with pytest.raises(UserError, match="the run is at step 7 already; profile steps from 8 on"):
        check_steps(ProfiledSteps(5, 9), config, train, done=7)
    # The same command resumes a run that was interrupted while or after it recorded.
    (config.run_folder / "profile").mkdir(parents=True)
    (config.run_folder / "profile" / "rank-0000.steps-5-7.pt.trace.json").write_text("{}")
    assert not check_steps(ProfiledSteps(5, 9), config, train, done=7)


def steps_in(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")]


def names_in(path: Path) -> set[str]:
    return {str(event.get("name")) for event in json.loads(path.read_text())["traceEvents"]}


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path):
    profiler = StepProfiler(RunFolder(tmp_path), ProfiledSteps(2, 3), 1, torch.device("cpu"))
    told = []
    for step in range(1, 5):
        profiler.begin(step)
        torch.ones(4).sum()
        told.append(profiler.end(step))
    assert [event is not None for event in told] == [False, False, True, False]
    assert profiler.close(4) is None
    (path,) = traces(RunFolder(tmp_path), 2)
    assert path.name == "rank-0001.steps-2-3.pt.trace.json"
    assert str(tmp_path / "profile" / "rank-*.steps-2-3.pt.trace.json") in told[2]
    assert steps_in(path) == ["ProfilerStep#2", "ProfilerStep#3"]


def test_a_run_that_ends_early_writes_what_there_is_or_says_that_there_is_nothing(tmp_path):
    profiler = StepProfiler(RunFolder(tmp_path), ProfiledSteps(2, 9), 0, torch.device("cpu"))
    profiler.begin(2)
    profiler.end(2)
    profiler.begin(3)  # whose rows are read, but a stop request comes
    assert "profile of steps 2 to 2" in profiler.close(2)
    assert "before step 5; there is no trace" in StepProfiler(
        RunFolder(tmp_path), ProfiledSteps(5, 9), 0, torch.device("cpu")
    ).close(4)
    # As a job that is put back into the queue after those steps.
    assert StepProfiler(RunFolder(tmp_path), ProfiledSteps(2, 3), 0, torch.device("cpu")).close(7) is None


def train_in_pieces(rank, plain, profiled):
    """A run without a profile; and one that is stopped at step 5, whose second start profiles steps 7 and 8."""
    os.environ.pop(VARIABLE, None)
    codes = [train(rank, plain, 2), train(rank, profiled, 2, 5)]
    os.environ[VARIABLE] = "7:8"
    return [*codes, train(rank, profiled, 2)]


@pytest.mark.slow
def test_a_resumed_run_that_is_profiled_trains_as_one_that_is_not_and_tells_what_it_costs(
    make_config, manifest, tmp_path
):
    training = {"tokens": 4_000, "precision": "fp32", "sharding": "full"}
    # Without metrics that are taken at log steps alone, and with them at every second step.
    plain = make_config("plain", training={**training, "log_every": 1000})
    profiled = make_config("profiled", training={**training, "log_every": 2})
    for config in (plain, profiled):
        open_run_folder(config, manifest)
    assert run_on_ranks(train_in_pieces, 2, tmp_path / "ranks", plain, profiled) == [[0, 75, 0]] * 2
    assert curve(plain) == curve(profiled)
    assert not (plain.run_folder / "profile").exists()
    paths = traces(RunFolder(profiled.run_folder), 7)
    assert [path.name[:9] for path in paths] == ["rank-0000", "rank-0001"]
    for path in paths:
        assert steps_in(path) == ["ProfilerStep#7", "ProfilerStep#8"]
        assert {"data", "forward", "backward", "optimizer", "communication"} <= names_in(path)
    told = [r for r in RunFolder(profiled.run_folder).metrics() if "time_shares" in r]
    assert [r["step"] for r in told if "grad_norms" in r] == list(range(2, told[-1]["step"] + 1, 2))
    for record in told:
        assert sum(record["time_shares"].values()) == pytest.approx(1, abs=1e-3)
        assert all(record["time_shares"][name] > 0 for name in ("data", "forward_backward", "communication"))
        assert record["peak_memory_bytes"] > 0
        assert record["planned_memory_bytes"] > 0
        if "grad_norms" in record:
            assert math.hypot(*record["grad_norms"].values()) == pytest.approx(record["grad_norm"], rel=1e-4)
            assert all(0 < ratio < 1 for ratio in record["update_ratios"].values())
